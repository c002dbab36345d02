"""benchmarks.json: what the numbers are called and mean, and of which checkpoint they are."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from slimqwen.artifacts import fingerprint_value
from slimqwen.checkpoint.identity import content_fingerprint
from slimqwen.checkpoint.writer import companions_fingerprint
from slimqwen.core.errors import UserError
from slimqwen.core.regular_files import read_regular

FORMAT = "slimqwen.benchmarks/1"


class Result(BaseModel):
    """One number. Of a group's tasks each has its own too: `part_of` is the group that the user asked for.

    difference: value minus the teacher's. difference_stderr: of the mean of the differences by document, None where the
    metric is no mean over documents.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    task: str
    part_of: str | None
    metric: str
    filter: str  # how the answer was found in the text; "none" where nothing was generated
    value: float
    stderr: float | None
    documents: int
    difference: float | None
    difference_stderr: float | None

    @property
    def score(self) -> str:
        """`0.4120 ± 0.0123`"""
        return _with_error(f"{self.value:.4f}", self.stderr)

    @property
    def change(self) -> str | None:
        """`-0.0310 ± 0.0071`"""
        return None if self.difference is None else _with_error(f"{self.difference:+.4f}", self.difference_stderr)


def _with_error(value: str, stderr: float | None) -> str:
    return value if stderr is None else f"{value} ± {stderr:.4f}"


class Benchmarks(BaseModel):
    """benchmarks.json."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal["slimqwen.benchmarks/1"]
    teacher: str | None  # a key of `models`
    models: dict[str, str]  # name -> checkpoint
    identities: dict[str, str] = {}  # name -> `identity_of` the checkpoint when it was measured
    limit: int | None  # documents per task; None: all
    shots: int | None  # None: as each task says
    results: list[Result]

    @classmethod
    def load(cls, path: Path) -> "Benchmarks":
        """Raises UserError for a file that is missing or is not of benchmarks."""
        try:
            return cls.model_validate_json(read_regular(path))
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): run `slimqwen evaluate --tasks` to make it."
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path} is not of {FORMAT} ({where or 'whole file'}: {first['msg']}).") from error

    def lines(self) -> dict[tuple[str, str], dict[str, Result]]:
        """What was asked for, without the single tasks of a group: (task, metric) -> model -> result."""
        found: dict[tuple[str, str], dict[str, Result]] = {}
        for result in self.results:
            if result.part_of is None:
                metric = result.metric if result.filter == "none" else f"{result.metric} ({result.filter})"
                found.setdefault((result.task, metric), {})[result.model] = result
        return found

    def with_own(self, folder: Path, name: str) -> "Benchmarks":
        """The same, but the model that was measured as it lies in `folder` now, if there is one, is called `name`."""
        identity = identity_of(folder)
        own = {model: name for model, measured in self.identities.items() if measured == identity}
        return self.model_copy(
            update={
                "models": {own.get(model, model): path for model, path in self.models.items()},
                "identities": {own.get(model, model): measured for model, measured in self.identities.items()},
                "results": [row.model_copy(update={"model": own.get(row.model, row.model)}) for row in self.results],
            }
        )


def identity_of(folder: Path) -> str:
    """The fingerprint of what a benchmark depends on: a checkpoint's config and weights, and what is copied along with them.

    The card is none of these, for it may tell the result; nor are notes and whatever else lies in the folder.
    """
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return fingerprint_value([*map(content_fingerprint, files), companions_fingerprint(folder)])
