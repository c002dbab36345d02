"""The stage `calibrate`: a checkpoint and tokens in, statistics out."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from slimqwen.artifacts import makes_file
from slimqwen.calibration.observe import observe
from slimqwen.calibration.statistics import Statistics
from slimqwen.calibration.text import TRAINING_TEXT, CalibrationText
from slimqwen.calibration.walk import Walk, is_unfinished
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core import torchrun
from slimqwen.core.progress import Progress, quiet, say
from slimqwen.layerwise.memory import Allotment, allot, fits
from slimqwen.model.device import reproducible, resolve_device, resolve_dtype
from slimqwen.model.kernels import announce_slow
from slimqwen.model.model import load
from slimqwen.parallel.job import Job, join_job
from slimqwen.recipe import CalibrationRecipe, Execution, TextSettings

# The ways to measure.
IN_MEMORY = "in memory"
LAYER_BY_LAYER = "layer by layer"


@makes_file("checkpoint", "tokens", "recipe", kind="safetensors")
@torch.inference_mode()
def calibrate(
    checkpoint: Path,
    out: Path,
    *,
    tokens: Path | None = None,
    recipe: CalibrationRecipe,
    text: TextSettings,
    execution: Execution = Execution(),  # noqa: B008 - immutable
    second_moments: bool = False,
    title: str = "calibrate",
) -> Statistics:
    """Run `recipe.samples` sequences through the model once; write every criterion's sums to `out`.

    The sequences are those of `CalibrationText`: of `recipe.sources`, or where it names none of the folder `tokens`.
    The MTP module is measured at the positions whose next token is in the row, i.e. all of them: rows hold one token more
    than the model reads. A model that does not fit into memory is measured layer by layer (`walk`).

    All processes that torchrun started may call it together: each measures a share of the sequences, in its memory where the
    model fits into that of each, else layer by layer, and the sums are added up.

    second_moments: also sum up z z' of every norm's input, which `pruning.width: rotation` needs: 2 hidden^2 operations
    per token and norm, a tenth of the forward pass of Qwen3-Next-80B.
    """
    source = Checkpoint(checkpoint)
    sources = recipe.sources
    if not sources:
        assert tokens is not None, "there is no text to calibrate on"
        sources = {TRAINING_TEXT: tokens}
    sequences = CalibrationText(
        sources, source, samples=recipe.samples, sequence_length=text.sequence_length, seed=text.seed
    )
    statistics = Statistics(
        checkpoint=source.fingerprint(),
        data=sequences.fingerprint,
        tokens={
            part: {"main": count, "mtp": count if source.has_mtp else 0} for part, count in sequences.tokens.items()
        },
    )
    device = resolve_device(execution.device)
    work = _Work(source, sequences, execution, resolve_dtype(text.dtype, device), device, second_moments, title)
    with join_job(device) as job, quiet(not job.is_first), reproducible(device):
        size = job.share[1]
        way = job.lead(lambda: work.choose_way(out, size))
        work.measure(statistics, out, way, job)
        return statistics if way == IN_MEMORY and job.is_first else Statistics.load(out)


@dataclass(frozen=True)
class _Work:
    """What is measured, and by which settings."""

    source: Checkpoint
    text: CalibrationText
    execution: Execution
    dtype: torch.dtype
    device: torch.device
    second_moments: bool
    title: str

    def choose_way(self, out: Path, ranks: int) -> str:
        """Return the way to measure: layer by layer by choice, to finish what was begun so, or where the model does not fit.

        ranks: how many share the text, each with a model of its own.
        """
        self.text.warn_where_short()
        announce_slow(self.source.family, self.source.config, self.device)
        streaming = self.execution.streaming
        processes = min(ranks, torchrun.local_world_size())
        if streaming or (streaming is None and (is_unfinished(out) or not self._fits(processes))):
            return LAYER_BY_LAYER
        return IN_MEMORY

    def _fits(self, processes: int) -> bool:
        return fits(
            self.source,
            parts=len(self.text.sections),
            budget_bytes=self.execution.memory_budget,
            dtype=self.dtype,
            device=self.device,
            second_moments=self.second_moments,
            processes=processes,
        )

    def measure(self, statistics: Statistics, out: Path, way: str, job: Job) -> None:
        """Measure this rank's share of the text, all of it alone; the first rank writes the sums of all."""
        text = self.text.share(*job.share)
        if way == LAYER_BY_LAYER:
            walk = Walk(self.source, text, self._allot(text), self.dtype, self.device, self.second_moments, job)
            walk.run(statistics, out, self.execution, self.title)
            return
        self._measure_in_memory(text, statistics)
        assert isinstance(statistics.sums, dict)
        job.add_up(statistics.sums)

        def save() -> str:
            statistics.save(out)
            return str(out)

        job.lead(save)

    def _allot(self, text: CalibrationText) -> Allotment:
        return allot(
            self.source,
            self.execution,
            rows=max(text.sections, default=1),
            sequence_length=text.shape[1] - 1,
            dtype=self.dtype,
            parts=len(self.text.sections),
            second_moments=self.second_moments,
        )

    def _measure_in_memory(self, text: CalibrationText, statistics: Statistics) -> None:
        model = load(self.source.folder, self.dtype, self.device)
        total, started = sum(text.tokens.values()), time.perf_counter()
        with (
            observe(model, statistics, self.second_moments) as measuring,
            Progress(self.title, total=total, unit="tokens") as progress,
        ):
            for part, rows in text.batches(self.execution.batch_size):
                with statistics.part(part):
                    model(rows.to(self.device))
                progress.advance(rows[:, 1:].numel())
        own = 1 - measuring.seconds / (time.perf_counter() - started)
        say(f"{self.title}: {own:.0%} of the time in the model's own forward pass, the rest measuring")
