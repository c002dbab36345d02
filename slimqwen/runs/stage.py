"""What all stages have in common: the artefact, what it is made from and how, and the key that it is recognised by."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from slimqwen.artifacts import fingerprint
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.recipe import Execution, Section


class Stage(ABC):
    """One artefact that is not made yet: from which inputs, by which method.

    Attributes:
        file: the name of the artefact, a file or a folder.
        revision: raised when the same inputs and method give another result, so that what is there is made again.
        is_shared: whether all ranks of a job make it together; else the first does, and the others wait.
    """

    file: ClassVar[str]
    revision: ClassVar[int]
    is_shared: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Return the name in messages: the artefact's, without its suffix."""
        return Path(self.file).stem

    @property
    @abstractmethod
    def inputs(self) -> Mapping[str, Any]:
        """Return what the artefact is made from, by name: paths, `Lazy` inputs, or lists and mappings of them.

        A string is taken for the fingerprint of something that is no artefact.
        """

    @property
    @abstractmethod
    def method(self) -> Mapping[str, Any]:
        """Return the settings that the result depends on: sections of the recipe, or JSON. All of them are part of the key."""

    @abstractmethod
    def make(self, out: Path, execution: Execution, title: str) -> None:
        """Write the artefact to `out`.

        execution: settings that the result does not depend on, beyond rounding; no part of the key.
        title: shown with the progress.
        """

    def scratch_of(self, out: Path) -> Sequence[Path]:
        """Return what `make` leaves beside `out` to resume from: to be removed once it is on record that `out` is complete."""
        return ()

    @property
    def lazy(self) -> Sequence["Lazy"]:
        """Return the inputs that are made for this artefact alone."""
        return ()

    @property
    def used_up(self) -> Sequence[Path]:
        """Return inputs that a run, which makes each artefact once, needs no longer."""
        return ()

    def identity(self) -> dict[str, Any]:
        """Return all that the artefact depends on, as JSON; its hash is the key of the artefact."""
        return {
            "stage": self.name,
            "revision": self.revision,
            "inputs": {name: identity_of(value) for name, value in self.inputs.items()},
            "method": {name: identity_of(value) for name, value in self.method.items()},
        }


class Store(Protocol):
    """Where artefacts lie: those of a run by the stage of its schedule, those of a study by their keys."""

    def get(self, stage: Stage) -> Path:
        """Return the artefact, made unless it is there."""

    def within(self, folder: str) -> Self:
        """Return the same store for what belongs to one folder of a run, such as `stage-1`."""

    @property
    def metrics(self) -> Path | None:
        """Return the metrics.jsonl of all trainings; None where each has its own beside its result."""


@dataclass(frozen=True)
class Lazy:
    """An input that is made when the work on what needs it begins, because it is large, and known before by its key."""

    stage: Stage
    store: Store

    def get(self) -> Path:
        """Return the input, made unless it is there."""
        return self.store.get(self.stage)


def identity_of(value: Any) -> Any:
    """Return an input or a setting as JSON: the fingerprint of a path, all fields of a section.

    A checkpoint's fingerprint is that of its model, whatever lies beside it; of other paths that of all their content.
    """
    match value:
        case Path():
            return Checkpoint(value).fingerprint() if (value / "config.json").is_file() else fingerprint(value)
        case Section():
            return value.model_dump(mode="json")
        case Lazy():
            return value.stage.identity()
        case Mapping():
            return {name: identity_of(part) for name, part in value.items()}
        case list() | tuple():
            return [identity_of(part) for part in value]
    return value
