"""Checkpoints of true shapes with random weights, written at about the speed of the disk, for the benchmarks."""

from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from slimqwen.checkpoint.shards import DEFAULT_SHARD_BYTES, TensorInfo
from slimqwen.checkpoint.writer import CheckpointWriter
from slimqwen.families import family_of
from slimqwen.families.family import Layout

BLOCK_ELEMENTS = 1 << 24  # drawn once (in a second); every tensor is a run of them at an offset of its own
STANDARD_DEVIATION = 0.02
ZERO_CENTRED = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")  # their norms multiply by 1 + weight


def folder_to_use(text: str) -> Path:
    """Return the path of a folder, for argparse: one that does not exist is a sentence and no traceback."""
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise ArgumentTypeError(f"{text} is not a folder: make it first, or choose another.")
    return folder


def write_synthetic(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    layouts: Mapping[str, Layout] | None = None,
) -> None:
    """Write a checkpoint with this config.json (`config`, in the family's own form) into an existing folder.

    Matrices are normal(0, 0.02), norms have a gain of 1, and A_log is float32 as in the releases: a forward pass stays
    finite. In memory: one block of 32 MB in bfloat16. layouts: block name -> layout; None: the family's.
    """
    family = family_of(dict(config), "the config")
    canonical = {**family.normalise(dict(config)), "dtype": str(dtype).removeprefix("torch.")}
    block = STANDARD_DEVIATION * torch.randn(BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(seed))
    by_dtype = {dtype: block.to(dtype), torch.float32: block}
    ones = {kind: torch.ones_like(values) for kind, values in by_dtype.items()}
    zeros = {kind: torch.zeros_like(values) for kind, values in by_dtype.items()}

    def values_of(tensor: TensorInfo) -> torch.Tensor:
        if "norm" not in tensor.name:
            return by_dtype[tensor.dtype]
        zero_centred = family.model_type in ZERO_CENTRED and "linear_attn.norm" not in tensor.name
        return (zeros if zero_centred else ones)[tensor.dtype]

    specs = family.tensors(canonical, layouts)
    tensors = [
        TensorInfo(spec.name, torch.float32 if spec.name.endswith("A_log") else dtype, spec.shape) for spec in specs
    ]
    with CheckpointWriter(folder, tensors, shard_bytes) as writer:
        for number, tensor in enumerate(writer.missing()):
            for first_row, shape in _runs_of_rows(tensor.shape):
                count = torch.Size(shape).numel()
                start = 40_503 * (number + first_row) % (BLOCK_ELEMENTS - count)
                writer.add(tensor.name, values_of(tensor)[start : start + count].view(shape), first_row)
        writer.finish(family.to_disk(canonical))


def _runs_of_rows(shape: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield runs of a tensor's rows that fit into the block: the number of the first row, and the run's shape."""
    row = shape[-1] if len(shape) > 1 else 1
    rows = torch.Size(shape).numel() // row
    step = BLOCK_ELEMENTS // 2 // row
    for start in range(0, rows, step):
        yield start, (min(step, rows - start), row)[: min(len(shape), 2)]
