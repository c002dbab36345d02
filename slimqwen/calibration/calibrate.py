"""The stage `calibrate`: a checkpoint and tokens in, statistics out."""

import time
from pathlib import Path

import torch

from slimqwen.artifacts import makes_file
from slimqwen.calibration.observe import observe
from slimqwen.calibration.statistics import Statistics
from slimqwen.calibration.text import TRAINING_TEXT, CalibrationText
from slimqwen.calibration.walk import Walk, is_unfinished
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.progress import Progress, say
from slimqwen.layerwise.memory import allot, fits
from slimqwen.model.device import reproducible, resolve_device, resolve_dtype
from slimqwen.model.kernels import announce_slow
from slimqwen.model.model import MtpCausalLM, load
from slimqwen.recipe import CalibrationRecipe, Execution, TextSettings


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
    sequences.warn_where_short()
    statistics = Statistics(
        checkpoint=source.fingerprint(),
        data=sequences.fingerprint,
        tokens={
            part: {"main": count, "mtp": count if source.has_mtp else 0} for part, count in sequences.tokens.items()
        },
    )
    torch_device = resolve_device(execution.device)
    torch_dtype = resolve_dtype(text.dtype, torch_device)
    announce_slow(source.family, source.config, torch_device)
    with reproducible(torch_device):
        if _is_streamed(source, sequences, out, execution, torch_dtype, second_moments):
            allotment = allot(
                source,
                execution,
                rows=max(sequences.sections),
                sequence_length=text.sequence_length,
                dtype=torch_dtype,
                parts=len(sequences.sections),
                second_moments=second_moments,
            )
            Walk(source, sequences, allotment, torch_dtype, torch_device, second_moments).run(statistics, out, title)
            return Statistics.load(out)
        model = load(checkpoint, torch_dtype, torch_device)
        _measure_in_memory(model, sequences, execution.batch_size, torch_device, statistics, second_moments, title)
    statistics.save(out)
    return statistics


def _is_streamed(
    source: Checkpoint,
    text: CalibrationText,
    out: Path,
    execution: Execution,
    dtype: torch.dtype,
    second_moments: bool,
) -> bool:
    """Return whether to measure layer by layer: by choice, to finish what was begun so, or where the model does not fit."""
    if execution.streaming is not None:
        return execution.streaming
    return is_unfinished(out) or not fits(
        source,
        parts=len(text.sections),
        budget_bytes=execution.memory_budget,
        dtype=dtype,
        device=resolve_device(execution.device),
        second_moments=second_moments,
    )


def _measure_in_memory(
    model: MtpCausalLM,
    text: CalibrationText,
    batch_size: int,
    device: torch.device,
    statistics: Statistics,
    second_moments: bool,
    title: str,
) -> None:
    total, started = sum(text.tokens.values()), time.perf_counter()
    with (
        observe(model, statistics, second_moments) as measuring,
        Progress(title, total=total, unit="tokens") as progress,
    ):
        for part, rows in text.batches(batch_size):
            with statistics.part(part):
                model(rows.to(device))
            progress.advance(rows[:, 1:].numel())
    own = 1 - measuring.seconds / (time.perf_counter() - started)
    say(f"{title}: {own:.0%} of the time in the model's own forward pass, the rest measuring")
