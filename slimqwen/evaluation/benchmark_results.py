"""The format of benchmarks.json: names and meaning of its values, and the checkpoints they belong to."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slimqwen.artifacts import fingerprint_value
from slimqwen.artifacts.json_file import load_model
from slimqwen.checkpoint.identity import content_fingerprint
from slimqwen.checkpoint.writer import companions_fingerprint

FORMAT = "slimqwen.benchmarks/1"


class Result(BaseModel):
    """The value of one metric. The tasks of a group have values too, with the requested group in `part_of`.

    difference: value minus the teacher's. difference_stderr: of the mean of the differences by document, None where the
    metric is not a mean over documents.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    task: str
    part_of: str | None
    metric: str
    filter: str  # how the answer was extracted from the generated text; "none" where nothing was generated
    value: float
    stderr: float | None
    documents: int
    difference: float | None
    difference_stderr: float | None

    @property
    def score(self) -> str:
        """The value with its standard error: `0.4120 ± 0.0123`."""
        return _with_error(f"{self.value:.4f}", self.stderr)

    @property
    def change(self) -> str | None:
        """The difference with its standard error: `-0.0310 ± 0.0071`."""
        return None if self.difference is None else _with_error(f"{self.difference:+.4f}", self.difference_stderr)


def _with_error(value: str, stderr: float | None) -> str:
    return value if stderr is None else f"{value} ± {stderr:.4f}"


class Benchmarks(BaseModel):
    """The content of benchmarks.json."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal["slimqwen.benchmarks/1"]
    teacher: str | None  # a key of `models`
    models: dict[str, str]  # name -> checkpoint
    identities: dict[str, str] = {}  # name -> `identity_of` the checkpoint at the time of measurement
    limit: int | None  # documents per task; None: all
    shots: int | None  # None: each task's own number
    results: list[Result]

    @classmethod
    def load(cls, path: Path) -> "Benchmarks":
        """Load the file. Raises UserError where it is missing or not of this format."""
        return load_model(path, cls, what=f"of {FORMAT}", advice="run `slimqwen evaluate --tasks` to make it.")

    def lines(self) -> dict[tuple[str, str], dict[str, Result]]:
        """Return the requested results, without the single tasks of groups: (task, metric) -> model -> result."""
        found: dict[tuple[str, str], dict[str, Result]] = {}
        for result in self.results:
            if result.part_of is None:
                metric = result.metric if result.filter == "none" else f"{result.metric} ({result.filter})"
                found.setdefault((result.task, metric), {})[result.model] = result
        return found

    def with_own(self, folder: Path, name: str) -> "Benchmarks":
        """Return a copy in which the model with the current identity of `folder`, if any, is called `name`."""
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
    """Fingerprint what a benchmark depends on: a checkpoint's config, weights and companions.

    The model card is excluded, because it may state the result, and so are all other files in the folder.
    """
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return fingerprint_value([*map(content_fingerprint, files), companions_fingerprint(folder)])
