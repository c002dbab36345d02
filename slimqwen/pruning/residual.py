"""What a cut makes of the tensors that touch the residual stream, beyond choosing channels."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.families.axes import Axis, Cat, Read, Term
from slimqwen.families.family import Block, Part
from slimqwen.planning.mtp_rotation import gain, norm_of, stretches
from slimqwen.planning.rotation import Basis

MATRICES_HELD = 4  # threads work on neighbouring tensors


class Residual:
    """The residual stream of a cut model.

    Without a basis channels are chosen as they stand, and norms may be compensated: their gain is multiplied by
    sqrt(hidden / kept) (`basis.cut_gain`). With one, every matrix that writes into the stream is multiplied by
    diag(t) B, every matrix that reads a norm by diag(gain) R, and all gains become `Basis.scales`.
    """

    def __init__(self, source: Checkpoint, kept: int, *, compensate: bool, basis: Basis | None) -> None:
        self._source = source
        self._basis = basis
        self._factor = math.sqrt(source.config["hidden_size"] / kept) if compensate else 1.0
        self._stretches = None if basis is None else stretches(source)
        self._written = lru_cache(MATRICES_HELD)(self._written_into)
        self._read = lru_cache(MATRICES_HELD)(self._read_after)

    @property
    def is_rotated(self) -> bool:
        return self._basis is not None

    def memory_bytes(self) -> int:
        """Return what a rotation holds in memory at the peak: matrices [hidden, kept] in float32, those of two norms joined among them."""
        return 0 if self._basis is None else (2 * MATRICES_HELD + 4) * 4 * self._basis.directions.numel()

    def matrix(self, term: Term, block: Block, part: Part, stored: torch.dtype) -> Tensor:
        """Return what a dimension that mentions the hidden axis is multiplied by, [size, new size]; `block` is the source's.

        In float32 for weights that are stored in 16 bits, in float64 for others: the product is rounded once.
        """
        dtype = torch.float32 if stored.itemsize == 2 else torch.float64
        match term:
            case Axis():
                return self._written(block.is_mtp and part != "embedding", dtype)
            case Read():
                return self._read(norm_of(block, term), dtype)
            case Cat(parts):
                joined: Tensor = torch.block_diag(*(self.matrix(inner, block, part, stored) for _, inner in parts))
                return joined
        raise AssertionError(f"not a dimension of the residual stream: {term}")

    def norm(self, name: str, weight: Tensor) -> Tensor:
        """Compute the weight of a cut norm, [kept], from that of the whole one in the kept channels; `name` is the source's."""
        offset = self._source.family.norm_offset
        if self._basis is not None:
            return torch.full_like(weight, self._basis.scales[name] - offset)
        if self._factor == 1.0:
            return weight
        return ((weight.double() + offset) * self._factor - offset).to(weight.dtype)

    def _written_into(self, mtp_stream: bool, dtype: torch.dtype) -> Tensor:
        assert self._basis is not None and self._stretches is not None
        t = self._stretches.mtp_stream if mtp_stream else torch.ones_like(self._stretches.mtp_stream)
        return (t[:, None] * self._basis.directions).to(dtype)

    def _read_after(self, norm: str, dtype: torch.dtype) -> Tensor:
        assert self._basis is not None and self._stretches is not None
        if norm in self._basis.readers:
            read = self._basis.readers[norm].double()
        else:
            read = self._basis.directions / self._stretches.norms[norm][:, None]
        return (gain(self._source, norm)[:, None] * read).to(dtype)
