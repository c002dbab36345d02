"""The stage `calibrate`: a checkpoint and tokens in, statistics out."""

from pathlib import Path

import torch

from slimqwen.calibration.observe import observe
from slimqwen.calibration.statistics import Statistics
from slimqwen.calibration.text import TRAINING_TEXT, CalibrationText
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.modeling.device import reproducible, resolve_device, resolve_dtype
from slimqwen.modeling.model import load
from slimqwen.progress import Progress
from slimqwen.recipe import CalibrationRecipe


@torch.inference_mode()
def calibrate(
    checkpoint: Path,
    out: Path,
    *,
    tokens: Path | None = None,
    recipe: CalibrationRecipe,
    sequence_length: int,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    title: str = "calibrate",
) -> Statistics:
    """Run `recipe.samples` sequences through the model once; write every criterion's sums to `out`.

    The sequences are those of `CalibrationText`: of `recipe.sources`, or where it names none of the folder `tokens`.
    The MTP module is measured at the positions whose next token is known, i.e. all of them: rows carry one token more
    than the model reads.
    """
    source = Checkpoint(checkpoint)
    sources = recipe.sources
    if not sources:
        assert tokens is not None, "there is no text to calibrate on"
        sources = {TRAINING_TEXT: tokens}
    text = CalibrationText(sources, source, samples=recipe.samples, sequence_length=sequence_length, seed=seed)
    text.say_what_is_short()
    statistics = Statistics(
        checkpoint=source.fingerprint(),
        data=text.fingerprint,
        tokens={part: {"main": count, "mtp": count if source.has_mtp else 0} for part, count in text.tokens.items()},
    )
    torch_device = resolve_device(device)
    model = load(checkpoint, resolve_dtype(dtype, torch_device), torch_device)
    with (
        reproducible(torch_device),
        observe(model, statistics),
        Progress(title, total=sum(text.tokens.values()), unit="tokens") as progress,
    ):
        for part, rows in text.batches(recipe.batch_size):
            with statistics.part(part):
                model(rows.to(torch_device))
            progress.advance(rows[:, 1:].numel())
    statistics.save(out)
    return statistics
