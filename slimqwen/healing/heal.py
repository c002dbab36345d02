"""The stage `heal`: a cut checkpoint, its teacher and tokens in, the same checkpoint with every layer trained alone out."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from slimqwen.artifacts import atomic_folder, fingerprint_value, makes_folder, scratch_folder
from slimqwen.calibration.statistics import Part
from slimqwen.checkpoint.writer import copy_companions
from slimqwen.healing.layers import BETAS, MAX_GRAD_NORM, WARMUP, Healing, HealingSettings
from slimqwen.layerwise.pair import Pair, write_changed
from slimqwen.modeling.device import reproducible
from slimqwen.planning.plan import Plan

HELD_FOR_GRADIENTS = 3  # times as much memory for activations as without gradients, about
LEFT_OUT = 16  # every so-manieth sequence of each source is left out of the training


@makes_folder("student", "teacher", "tokens", "plan", kind="checkpoint")
def heal(
    student: Path,
    out: Path,
    *,
    teacher: Path,
    plan: Path | Plan,
    tokens: Path | Mapping[str, Path],
    samples: int = 512,
    epochs: int = 2,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    sequence_length: int = 256,
    memory_budget_bytes: int = 2_000_000_000,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    title: str = "heal",
) -> Path:
    pair = Pair(
        student,
        teacher,
        plan=plan,
        tokens=tokens,
        samples=samples,
        batch_size=batch_size,
        sequence_length=sequence_length,
        memory_budget_bytes=memory_budget_bytes // HELD_FOR_GRADIENTS,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    settings = HealingSettings(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    layers = out.with_name(f"{out.name}.layers")
    key = fingerprint_value(
        [version("slimqwen"), *pair.made_from, repr(settings), WARMUP, BETAS, MAX_GRAD_NORM, LEFT_OUT]
    )
    with scratch_folder(layers, key) as folder, reproducible(pair.device):
        pair.announce(folder, title)
        stream, side_by_side = pair.side_by_side()
        healing = Healing(stream, settings, left_out_of(pair.parts), pair.rows_per_pass)
        changed = side_by_side.run(healing, folder, title)
        with atomic_folder(out) as partial:
            write_changed(pair.student, changed, partial)
            copy_companions(student, partial)
    return out


def left_out_of(parts: Sequence[Part]) -> torch.Tensor:
    """The rows that tell whether a layer has become better, bool [rows]: every 16th of each source, and one at least."""
    result = torch.zeros(len(parts), dtype=torch.bool)
    for source in dict.fromkeys(part.source for part in parts):
        rows = [row for row, part in enumerate(parts) if part.source == source]
        result[rows[LEFT_OUT - 1 :: LEFT_OUT] or rows[-1:]] = True
    return result
