"""The layout of tensors in the shards of a checkpoint, with all offsets fixed before any data is written."""

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch

from slimqwen.checkpoint.reader import SAFETENSORS_DTYPES, SINGLE_FILE

DEFAULT_SHARD_BYTES = 5_000_000_000
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
FILE_ORDER = ("F64", "F32", "BF16", "F16")  # safetensors puts wide dtypes first, so that every tensor is aligned


class TensorInfo(NamedTuple):
    """The name, dtype and shape of a tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * int(self.dtype.itemsize)


@dataclass(frozen=True)
class Shard:
    """A safetensors file. `tensors`: in the order of the file; `header`: the bytes before the first of them."""

    file: str
    tensors: tuple[TensorInfo, ...]
    header: bytes

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.tensor_bytes

    def places(self) -> Iterator[tuple[TensorInfo, int]]:
        """Yield each tensor and its offset in the file."""
        place = len(self.header)
        for tensor in self.tensors:
            yield tensor, place
            place += tensor.nbytes


def plan_shards(tensors: Iterable[TensorInfo], shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[Shard]:
    """Distribute tensors over shards in the given order; a new shard begins where the current would exceed `shard_bytes`.

    A larger tensor has a shard of its own. Within a shard the order, like every byte of the file, is that of
    `safetensors.torch.save_file`.
    """
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    number = len(shards)
    names = (
        [SINGLE_FILE] if number == 1 else [f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)]
    )
    return [_shard(name, sorted(shard, key=_place_in_file)) for name, shard in zip(names, shards, strict=True)]


def _place_in_file(tensor: TensorInfo) -> tuple[int, str]:
    return FILE_ORDER.index(DTYPE_NAMES[tensor.dtype]), tensor.name


def _shard(file: str, tensors: list[TensorInfo]) -> Shard:
    ends = list(accumulate((tensor.nbytes for tensor in tensors), initial=0))
    described = {
        tensor.name: {"dtype": DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
        for tensor, begin, end in zip(tensors, ends, ends[1:], strict=False)
    }
    header = {"__metadata__": {"format": "pt"}, **described}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Shard(file, tuple(tensors), struct.pack("<Q", len(text)) + text)
