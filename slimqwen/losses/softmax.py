"""The softmax of a block of logits, in memory used again, without a tensor of its logarithms."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slimqwen.losses.blocks import block_rows
from slimqwen.losses.divergence import Distribution, softmax_dtype

PIECE = 128
"""Logits of a row whose largest is found by vector instructions: an argmax of 151,936 took 0.92 ns per logit on a CPU, a largest value 0.05."""


class Softmax:
    """The softmax of [rows, vocab] logits, which must stay as they are while its logarithms are asked for.

    logits: [rows, vocab]. probs: [rows, vocab], in `softmax_dtype`. largest: [rows, 1], the largest logit.
    """

    def __init__(self, logits: Tensor, out: Tensor) -> None:
        """Compute it; `out` [rows, vocab] is overwritten and becomes `probs`."""
        self.logits = logits
        self.probs = torch.softmax(logits, dim=1, dtype=out.dtype, out=out)
        self.largest = logits.amax(1, keepdim=True).to(out.dtype)
        self._log_largest = self.probs.amax(1, keepdim=True).log()  # the largest probability is one over the sum

    @property
    def log_sum(self) -> Tensor:
        """Logarithm of the sum of exp(logits), [rows] float64."""
        return (self.largest.double() - self._log_largest.double()).squeeze(1)

    def log_probs_at(self, ids: Tensor) -> Tensor:
        """Return the logarithms of some probabilities; ids: int64 [rows, k]."""
        return (self.logits.gather(1, ids) - self.largest).add_(self._log_largest)

    def distribution(self) -> Distribution:
        """Return logarithms, a new tensor, and probabilities."""
        return Distribution((self.logits - self.largest).add_(self._log_largest), self.probs)


def most_likely(logits: Tensor) -> Tensor:
    """Return the index of the first of the largest logits of each row, [rows, 1]: of the largest piece, then within it."""
    vocab = logits.shape[1]
    if vocab < 2 * PIECE or logits.device.type != "cpu":
        return logits.argmax(1, keepdim=True)
    whole = vocab - vocab % PIECE
    pieces = logits[:, :whole].unflatten(1, (-1, PIECE)).amax(2)
    if whole < vocab:
        pieces = torch.cat([pieces, logits[:, whole:].amax(1, keepdim=True)], dim=1)
    start = (pieces.argmax(1, keepdim=True) * PIECE).clamp_(max=vocab - PIECE)
    return start + logits.gather(1, start + torch.arange(PIECE, device=logits.device)).argmax(1, keepdim=True)


@dataclass(frozen=True)
class Room:
    """Memory of blocks of at most `rows` rows over the vocabulary, allocated at first use.

    Memory allocated anew comes in pages that the system clears first: with it, a block took twice as long.
    """

    vocab: int
    rows: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, logits: Tensor) -> "Room":
        """Return room for the blocks of a chunk's logits, [chunk, vocab]."""
        chunk, vocab = logits.shape
        rows = block_rows(vocab, chunk, on_cpu=logits.device.type == "cpu")
        return cls(vocab, rows, softmax_dtype(logits), logits.device)

    def _empty(self) -> Tensor:
        return torch.empty(self.rows, self.vocab, dtype=self.dtype, device=self.device)

    @cached_property
    def student(self) -> Tensor:
        """Room for the student's softmax."""
        return self._empty()

    @cached_property
    def teacher(self) -> Tensor:
        """Room for the teacher's softmax."""
        return self._empty()

    @cached_property
    def scratch(self) -> Tensor:
        """Room for whatever is between the two."""
        return self._empty()
