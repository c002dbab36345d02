"""The KL to the teacher of a model cut to a target: cut, refitted where the recipe sets it, measured and deleted."""

import math
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from slimqwen.artifacts import claim_folder, discard, fingerprint, write_json
from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import StageFailed
from slimqwen.core.progress import duration, say
from slimqwen.evaluation.fidelity import Recording, compare, heldout_rows, record
from slimqwen.model.device import resolve_device, resolve_dtype
from slimqwen.model.model import load
from slimqwen.recipe import Recipe, Target
from slimqwen.runs import stages as work
from slimqwen.runs.stages import Work
from slimqwen.runs.store import Workshop
from slimqwen.shapes.target import completed, shape_of

RESULT = "kl.json"
SCRATCH = ".cut"  # the checkpoint that is being measured


class Gauge:
    """Measurement of targets of one teacher. Results are kept in `recipe.run_dir`, by content; checkpoints are deleted.

    One cut checkpoint is on disk at a time, and one model in memory; of the teacher, its final hidden states on the
    measured text and its lm_head, as in `evaluate`.
    """

    def __init__(self, recipe: Recipe, tokens: Path, statistics: Path | None, command: str) -> None:
        self._recipe = recipe
        self._tokens = tokens
        self._workshop = Workshop(recipe.run_dir, command)
        self._scratch = self._workshop.folder / SCRATCH
        claim_folder(
            self._scratch, None
        )  # before any work: check that it is ours, and remove what a killed search left there
        discard(self._scratch)
        self._source = Checkpoint(checkpoint_folder(recipe.teacher))
        self._statistics = statistics or self._workshop.statistics(recipe, self._source.folder, tokens)
        self._device = resolve_device(recipe.execution.device)
        self._dtype = resolve_dtype(recipe.dtype, self._device)
        self._rows = heldout_rows(tokens, recipe.data.sequence_length, recipe.evaluation.tokens)
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
        inputs = self._made_from | {"target": full.model_dump()}
        measured = self._workshop.made(RESULT, Work(inputs, lambda out, title: self._measure(full, out)))
        kl = float(read_json(measured)["kl_to_teacher"])
        self._done += 1
        self._say(target, kl)
        return kl

    def _say(self, target: Target, kl: float) -> None:
        left = (self._expected - self._done) * (time.monotonic() - self._started) / max(self._measured_now, 1)
        about = f", about {duration(left)} left" if self._measured_now else ""
        say(f"search {self._done}/{self._expected}: {in_words(target)}: KL {kl:.4f}{about}")

    def _measure(self, target: Target, out: Path) -> None:
        claim_folder(self._scratch, None)
        try:
            kl = self._cut_and_compare(target, self._scratch)
        finally:
            discard(self._scratch)
        write_json(
            out, {"format": "slimqwen.kl/1", "target": target.model_dump(exclude_none=True), "kl_to_teacher": kl}
        )
        self._measured_now += 1

    def _cut_and_compare(self, target: Target, scratch: Path) -> float:
        def made(name: str, step: Work) -> Path:
            step.make(scratch / name, name)
            return scratch / name

        recipe, source = self._recipe, self._source.folder
        cut, _ = work.cut(recipe, source, self._statistics, self._tokens, target, recipe.pruning, made)
        kl = float(compare(self._recording(cut, "cut model"), self._teacher)["kd"])
        if not math.isfinite(kl):
            raise StageFailed(
                f"the model cut to {in_words(target)} has no finite KL to the teacher: pin sizes nearer the source's."
            )
        return kl

    @cached_property
    def _made_from(self) -> dict[str, Any]:
        recipe = self._recipe
        inputs: dict[str, Any] = {
            "teacher": self._source.fingerprint(),
            "statistics": fingerprint(self._statistics),
            "tokens": fingerprint(self._tokens),
            "pruning": recipe.pruning.model_dump(),
            "measured_tokens": recipe.evaluation.tokens,
            "sequence_length": recipe.data.sequence_length,
            "dtype": recipe.dtype,
        }
        return inputs | (
            {"samples": recipe.calibration.samples, "seed": recipe.seed} if recipe.pruning.experts.refit else {}
        )

    @cached_property
    def _teacher(self) -> Recording:
        return self._recording(self._source.folder, "teacher")

    def _recording(self, folder: Path, title: str) -> Recording:
        checkpoint, model = Checkpoint(folder), load(folder, self._dtype, self._device)
        recording: Recording = record(
            model,
            checkpoint.family,
            checkpoint.config,
            self._rows,
            batch_size=self._recipe.execution.batch_size,
            title=f"measure {title}",
        )
        return recording


def in_words(target: Target) -> str:
    """Describe a target, as `hidden_size 96, num_experts 16`."""
    return ", ".join(f"{field} {size}" for field, size in target.model_dump(exclude_none=True).items())
