"""Where artefacts lie: a run's by the stage of its schedule, a study's by their content, a search's only while they are measured."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from slimqwen.artifacts import alone, claim_folder, discard, fingerprint_value, remove_ours, write_json
from slimqwen.checkpoint.config import read_json
from slimqwen.core.errors import UserError
from slimqwen.model.device import resolve_device, resolve_dtype
from slimqwen.parallel.job import Job
from slimqwen.recipe import Execution, Recipe
from slimqwen.runs.record import Steps
from slimqwen.runs.stage import Stage


@dataclass(frozen=True)
class RunStore:
    """The artefacts of one run, below `steps.run_dir`, those of this object in `folder`.

    Each is made by the ranks of `job`: what is on record, and what is to be made, the first of them decides for all.

    What is made from the same by the same method is made once: where a baseline begins as the main run does, its stages
    are found in the main run's folders (`found`, by key).
    """

    steps: Steps
    execution: Execution
    folder: Path
    found: dict[str, Path] = field(default_factory=dict)
    job: Job = field(default_factory=Job)

    @classmethod
    def of(cls, steps: Steps, execution: Execution, job: Job | None = None) -> "RunStore":
        """Return the store of a run's own folder. job: whose ranks follow the run's schedule; None: this process alone."""
        return cls(steps, execution, steps.run_dir, job=job or Job())

    def within(self, folder: str) -> "RunStore":
        """Return the store of a folder in this one."""
        return RunStore(self.steps, self.execution, self.folder / folder, self.found, self.job)

    @property
    def metrics(self) -> Path:
        """Return the metrics.jsonl of all trainings of the run."""
        return self.steps.run_dir / "metrics.jsonl"

    def get(self, stage: Stage) -> Path:
        """Return the artefact, made unless it is there. Inputs that the run needs no longer are removed."""
        out = self.folder / stage.file
        name = (self.folder / stage.name).relative_to(self.steps.run_dir).as_posix()

        def make() -> None:
            stage.make(out, self.execution, name)

        def make_on_all() -> None:
            self.job.together(make)

        action = make_on_all if stage.is_shared else make
        return Path(self.job.lead(lambda: str(self._get(stage, name, out, action)), make))

    def _get(self, stage: Stage, name: str, out: Path, make: Callable[[], None]) -> Path:
        identity = stage.identity()
        key = fingerprint_value(identity)
        if key not in self.found:
            self.steps.step(name, out, identity, make)
            for path in (*stage.scratch_of(out), *stage.used_up):
                remove_ours(path)
            for lazy in stage.lazy:
                self._remove(lazy.stage)
            self.found[key] = out
        return self.found[key]

    def _remove(self, stage: Stage) -> None:
        """Remove the artefact of a lazy input after its use, and what only it was made from, made in this process or not."""
        self.found.pop(fingerprint_value(stage.identity()), None)
        for path in (*stage.used_up, self.folder / stage.file):
            remove_ours(path)


class ContentStore:
    """Artefacts of many recipes, in `KIND/HASH/NAME`; `HASH` is that of everything the artefact is made from.

    Two variations of a recipe that begin alike (the same statistics, the same first stage) find each other's work, within
    a study and between studies; an interrupted study continues where it was.
    """

    metrics = None  # each training has its own

    def __init__(self, folder: Path, command: str, execution: Execution, job: Job | None = None) -> None:
        """job: whose ranks make the artefacts, as in a `RunStore`; None: this process alone."""
        self.folder = folder
        self.steps = Steps(folder, command)
        self.execution = execution
        self.job = job or Job()

    def begin(self, recipe: Recipe) -> None:
        """Note what the folder is for. Raises UserError where it holds numbers of another precision: they do not compare."""
        device = resolve_device(self.execution.device)
        numerics = {
            "format": "slimqwen.numerics/1",
            "device": device.type,
            "dtype": str(resolve_dtype(recipe.dtype, device)).removeprefix("torch."),
        }
        file = self.folder / "numerics.json"
        if file.is_file() and (found := read_json(file)) != numerics:
            raise UserError(
                f"{self.folder} holds work in {found['dtype']} on {found['device']}, and this is in {numerics['dtype']} on "
                f"{numerics['device']}: its numbers do not compare; choose another run_dir."
            )
        self.steps.begin(recipe)
        write_json(file, numerics)

    def within(self, folder: str) -> "ContentStore":
        """Return this store: its folders are named by content alone."""
        return self

    def get(self, stage: Stage) -> Path:
        """Return the artefact, made unless it is there. Of several processes that need it one makes it, and the others wait."""
        identity = stage.identity()
        place = f"{stage.name}/{fingerprint_value(identity)[:16]}"
        out = self.folder / place / stage.file

        def make() -> None:
            stage.make(out, self.execution, stage.name)

        def make_on_all() -> None:
            self.job.together(make)

        def get() -> str:
            with alone(out, wait=True):
                self.steps.step(place, out, identity, make_on_all if stage.is_shared else make)
            for path in stage.scratch_of(out):
                remove_ours(path)
            return str(out)

        return Path(self.job.lead(get, make))


class ScratchStore:
    """Artefacts of one cut at a time, which are of no use when it is measured."""

    metrics = None

    def __init__(self, folder: Path, execution: Execution, job: Job | None = None) -> None:
        """job: whose ranks make a cut together, as in a `RunStore`; None: this process alone."""
        self.folder = folder
        self.execution = execution
        self.job = job or Job()

    def within(self, folder: str) -> "ScratchStore":
        """Return this store: a cut has one folder."""
        return self

    def get(self, stage: Stage) -> Path:
        """Return the artefact, made now."""
        out = self.folder / stage.file

        def make() -> str:
            stage.make(out, self.execution, stage.name)
            return str(out)

        if not stage.is_shared:
            return Path(self.job.lead(make))
        make()
        self.job.wait()  # for the rank that puts it in place
        return out

    def claim(self) -> None:
        """Make the folder, or find it as ours, by the first rank. Raises UserError where it is not."""
        if self.job.is_first:
            claim_folder(self.folder, None)

    def empty(self) -> None:
        """Remove what lies in the folder, by the first rank. Raises UserError where it is not ours.

        No rank waits for another here, since this ends a cut that failed, too: all must have read what they need.
        """
        if self.job.is_first:
            claim_folder(self.folder, None)
            discard(self.folder)
