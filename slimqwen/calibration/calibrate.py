"""The stage `calibrate`: a checkpoint and tokens in, statistics out."""

from pathlib import Path

import torch

from slimqwen.artifacts import fingerprint_value
from slimqwen.calibration.observe import observe
from slimqwen.calibration.statistics import Statistics
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.data.packed import PackedTokens
from slimqwen.data.stream import TokenStream
from slimqwen.data.tokenize import check_vocabulary, load_manifest
from slimqwen.modeling.device import reproducible, resolve_device, resolve_dtype
from slimqwen.modeling.model import load
from slimqwen.progress import Progress
from slimqwen.recipe import CalibrationRecipe


@torch.inference_mode()
def calibrate(
    checkpoint: Path,
    out: Path,
    *,
    tokens: Path,
    recipe: CalibrationRecipe,
    sequence_length: int,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    title: str = "calibrate",
) -> Statistics:
    """Run `recipe.samples` training sequences through the model once; write every criterion's sums to `out`.

    The sequences are the first ones of the training order of `seed`, so distillation sees them too. The MTP module is
    measured at the positions whose next token is known, i.e. all of them: rows carry one token more than the model reads.
    """
    source = Checkpoint(checkpoint)
    manifest = load_manifest(tokens)
    check_vocabulary(manifest, tokens, source.folder, source.config["vocab_size"])
    torch_device = resolve_device(device)
    model = load(checkpoint, resolve_dtype(dtype, torch_device), torch_device)
    stream = TokenStream(PackedTokens(tokens / "train"), sequence_length, seed)
    measured = recipe.samples * sequence_length
    statistics = Statistics(
        checkpoint=source.fingerprint(),
        data=fingerprint_value([manifest.model_dump(mode="json"), recipe.samples, sequence_length, seed]),
        tokens={"main": measured, "mtp": measured if source.has_mtp else 0},
        sums={},
    )
    with (
        reproducible(torch_device),
        observe(model, source.family, source.config, statistics),
        Progress(title, total=measured, unit="tokens") as progress,
    ):
        for first in range(0, recipe.samples, recipe.batch_size):
            rows = stream.batch(first, min(recipe.batch_size, recipe.samples - first))
            model(rows.to(torch_device))
            progress.advance(rows[:, 1:].numel())
    statistics.save(out)
    return statistics
