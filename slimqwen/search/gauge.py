"""The KL to the teacher of a model cut to a target: cut, refitted where the recipe sets it, measured and deleted."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slimqwen.artifacts import write_json
from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import StageFailed
from slimqwen.core.progress import duration, say
from slimqwen.core.torchrun import rank
from slimqwen.evaluation.fidelity import Recording, compare, heldout_rows
from slimqwen.evaluation.loading import load_examinee
from slimqwen.evaluation.shares import Share
from slimqwen.model.device import resolve_device, resolve_dtype
from slimqwen.parallel.job import Job
from slimqwen.recipe import Execution, Recipe, Target
from slimqwen.runs.schedule import cut
from slimqwen.runs.stage import Stage
from slimqwen.runs.stages import Calibrating, DepthMeasuring, Healing, Planning, Pruning, Refitting
from slimqwen.runs.store import ContentStore, ScratchStore
from slimqwen.shapes.target import completed, shape_of

SCRATCH = ".cut"  # the checkpoint that is being measured


class Gauge:
    """Measurement of targets of one teacher. Results are kept in `recipe.run_dir`, by content; checkpoints are deleted.

    One cut checkpoint is on disk at a time, and one model in memory; of the teacher, its final hidden states on the
    measured text and its lm_head, as in `evaluate`. What does not fit is measured layer by layer.

    job: whose ranks cut and measure together, and call the same methods in the same order.
    """

    def __init__(
        self, recipe: Recipe, tokens: Path, statistics: Path | None, command: str, job: Job | None = None
    ) -> None:
        self._recipe = recipe
        self._job = job or Job()
        self._tokens = tokens
        self._execution = recipe.execution
        self._store = ContentStore(recipe.run_dir, command, self._execution, self._job)
        self._scratch = ScratchStore(self._store.folder / SCRATCH, self._execution, self._job)
        self._scratch.empty()  # before any work: check that it is ours, and remove what a killed search left
        self._source = Checkpoint(checkpoint_folder(recipe.teacher))
        self._statistics = statistics or self._store.get(Calibrating(recipe, self._source.folder, tokens))
        self._device = resolve_device(self._execution.device)
        self._dtype = resolve_dtype(recipe.dtype, self._device)
        rows = heldout_rows(tokens, recipe.data.sequence_length, recipe.evaluation.tokens)
        self._rows = Share.of(len(rows.tokens), self._job).rows(rows)
        self._done = self._expected = self._measured_now = 0
        self._started = time.monotonic()

    def expect(self, targets: int) -> None:
        """Set how many targets are still to come, for the progress."""
        self._expected = self._done + targets

    def kl(self, target: Target) -> float:
        """Return KL(teacher || cut model) on held-out text, nats per token. Raises StageFailed where it is not finite."""
        full = completed(self._source.family, target, self._source.config)
        if full == shape_of(self._source.family, self._source.config):
            return 0.0
        measuring = KlMeasuring(self._recipe, self._source.folder, self._statistics, self._tokens, full, self._measure)
        kl = float(self.agree(read_json(self._store.get(measuring))["kl_to_teacher"]))
        self._done += 1
        self._say(target, kl)
        return kl

    def agree(self, value: Any) -> Any:
        """Return the first rank's value, JSON, on every rank: what follows from it is then the same on all."""
        return self._job.gather(value)[0]

    def _say(self, target: Target, kl: float) -> None:
        left = (self._expected - self._done) * (time.monotonic() - self._started) / max(self._measured_now, 1)
        about = f", about {duration(left)} left" if self._measured_now else ""
        say(f"search {self._done}/{self._expected}: {in_words(target)}: KL {kl:.4f}{about}")

    def _measure(self, target: Target) -> float:
        """Cut the teacher to `target`, measure what is left, and remove it."""
        recipe, source, scratch = self._recipe, self._source.folder, self._scratch
        scratch.claim()
        try:
            last, _ = cut(recipe, source, self._statistics, scratch, tokens=self._tokens, target=target)
            kl = float(compare(self._recording(last, "cut model"), self._teacher, job=self._job)["kd"])
        finally:
            scratch.empty()
        if not math.isfinite(kl):
            raise StageFailed(
                f"the model cut to {in_words(target)} has no finite KL to the teacher: pin sizes nearer the source's."
            )
        self._measured_now += 1
        return kl

    @cached_property
    def _teacher(self) -> Recording:
        return self._recording(self._source.folder, "teacher")

    def _recording(self, folder: Path, title: str) -> Recording:
        rows, length = self._rows.tokens[:, 1:].shape
        examinee = load_examinee(
            Checkpoint(folder), (rows, length), self._dtype, self._device, self._job, self._execution
        )
        return examinee.record(self._rows, f"measure {title}")


@dataclass(frozen=True)
class KlMeasuring(Stage):
    """The KL to the teacher of what a target leaves; measure: cuts to the target, and returns the KL."""

    recipe: Recipe
    teacher: Path
    statistics: Path
    tokens: Path
    target: Target
    measure: Callable[[Target], float]

    file = "kl.json"
    revision = 1
    is_shared = True

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"teacher": self.teacher, "statistics": self.statistics, "tokens": self.tokens}

    @property
    def method(self) -> Mapping[str, Any]:
        recipe = self.recipe
        return {
            "target": self.target,
            "pruning": recipe.pruning,
            "healing": recipe.healing,
            "calibration": recipe.calibration,
            "measured_tokens": recipe.evaluation.tokens,
            "sequence_length": recipe.data.sequence_length,
            "seed": recipe.seed,
            "dtype": recipe.dtype,
            "revisions": [stage.revision for stage in (DepthMeasuring, Planning, Pruning, Refitting, Healing)],
        }

    def make(self, out: Path, execution: Execution, title: str) -> None:
        kl, target = self.measure(self.target), self.target.model_dump(exclude_none=True)
        if rank() == 0:
            write_json(out, {"format": "slimqwen.kl/1", "target": target, "kl_to_teacher": kl})


def in_words(target: Target) -> str:
    """Describe a target, as `hidden_size 96, num_experts 16`."""
    return ", ".join(f"{field} {size}" for field, size in target.model_dump(exclude_none=True).items())
