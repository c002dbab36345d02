"""A teacher's predictions on a batch: hidden states and a head to multiply, or its most likely tokens from disk.

Of either the loss takes the teacher's distribution over the vocabulary, a block of predictions at a time.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from slimqwen.losses.divergence import Distribution
from slimqwen.losses.head import ChunkedTeacher, Logits, Targets, zero_where_not


class TeacherSignal(ABC):
    """A teacher's part of the N predictions of the student's `Predictions` (lined up with `align` too)."""

    @abstractmethod
    def cast(self, dtype: torch.dtype) -> "TeacherSignal":
        """Return the same with matrix products in `dtype`."""

    @abstractmethod
    def chunks(self, student: Logits) -> ChunkedTeacher:
        """Return its distributions over chunks and blocks of the size of the student's."""


@dataclass(frozen=True)
class LiveSignal(TeacherSignal):
    """Hidden states and head of a teacher that runs beside the student."""

    hidden: Tensor  # [N, teacher_hidden]
    head: Tensor  # [vocab, teacher_hidden], the teacher's lm_head
    mtp_hidden: Tensor | None = None  # [N, teacher_hidden]; None: the student's MTP head learns from `hidden` too

    def cast(self, dtype: torch.dtype) -> "LiveSignal":
        return replace(self, head=self.head.to(dtype))

    def chunks(self, student: Logits) -> ChunkedTeacher:
        assert self.head.shape[0] == student.head.shape[0], "student and teacher must share a vocabulary"
        return _Projected(self, student.chunk.shape[0])


class _Projected(ChunkedTeacher, Targets):
    """The teacher's logits of one chunk, computed once for both heads where both learn from its main head."""

    def __init__(self, signal: LiveSignal, chunk_tokens: int) -> None:
        self._signal = signal
        self._logits = Logits(signal.head, chunk_tokens)

    def main(self, rows: Tensor) -> Targets:
        self._logits.project(self._signal.hidden[rows])
        return self

    def mtp(self, rows: Tensor, counts: Tensor, main: Targets) -> Targets:
        if self._signal.mtp_hidden is None:
            return main
        self._logits.project(zero_where_not(counts, self._signal.mtp_hidden[rows]))
        return self

    def distribution(self, block: slice, student: Distribution) -> Distribution:
        return self._logits.softmax(block)

    def most_likely(self, block: slice, distribution: Distribution) -> Tensor:
        return distribution.log_probs.argmax(1, keepdim=True)


class TopTokens(NamedTuple):
    """The k most likely tokens of N distributions, most likely first, and what is left for all others.

    ids: int64 [N, k]. log_probs: [N, k], nats. log_tail: [N], logarithm of the others' probability, finite always.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor

    @classmethod
    def of(cls, distribution: Distribution, k: int) -> "TopTokens":
        """Find them in [rows, vocab], whose `probs` are overwritten."""
        log_probs, ids = distribution.log_probs.topk(k, dim=1)
        return cls(ids, log_probs, _log_of_the_rest(distribution.probs, ids))

    def rows(self, rows: Tensor | slice) -> "TopTokens":
        """Return those of some of the distributions."""
        return TopTokens(self.ids[rows], self.log_probs[rows], self.log_tail[rows])

    def spread_like(self, student: Distribution, out: Distribution) -> Distribution:
        """Return the whole distribution whose tail has the student's proportions, [rows, vocab]; `out` is overwritten.

        With p~ = p on the top tokens and p_tail q_j / q_tail on every other token j, any f-divergence of p~ and q is that of
        the coarse partition {each top token, the tail}: p~ / q is the same all over the tail. Its gradient by the student's
        logits, p~ held constant, is that of the coarse divergence too: by a tail probability q_j both give f's derivative
        at (p_tail, q_tail), which is the same for every j. So the dense formulas of `Divergence` serve as they are.

            sum over top p log(p / q) + p_tail log(p_tail / q_tail)  <=  KL(p || q)

        since the partition forgets how the teacher spreads its tail (the log sum inequality).
        """
        probs = out.probs.copy_(student.probs)
        stretch = self.log_tail.to(probs.dtype) - _log_of_the_rest(probs, self.ids)
        log_probs = self.log_probs.to(probs.dtype)
        probs.mul_(stretch.exp()[:, None]).scatter_(1, self.ids, log_probs.exp())
        torch.add(student.log_probs, stretch[:, None], out=out.log_probs).scatter_(1, self.ids, log_probs)
        return out


def _log_of_the_rest(probs: Tensor, ids: Tensor) -> Tensor:
    """Return the logarithm of what is left beside the tokens `ids` [rows, k], whose entries of `probs` [rows, vocab] become 0; [rows].

    Summed up and not 1 minus the others, which in float32 has no digit left where the tail is 1e-7. Of nothing it is -87,
    and not minus infinity: 0 times that would be NaN.
    """
    rest = probs.scatter_(1, ids, 0.0).sum(1)
    return rest.clamp_min(torch.finfo(torch.float32).tiny).log()


@dataclass(frozen=True)
class StoredSignal(TeacherSignal):
    """The most likely tokens of a teacher that has run before."""

    main: TopTokens  # of N predictions, over the student's vocabulary
    mtp: TopTokens | None = None  # None: the student's MTP head learns from `main` too

    def cast(self, dtype: torch.dtype) -> "StoredSignal":
        return self  # there is no product

    def chunks(self, student: Logits) -> ChunkedTeacher:
        return _LookedUp(self, student.block)


class _LookedUp(ChunkedTeacher):
    """The stored rows of one chunk, spread over the vocabulary a block at a time in memory used again."""

    def __init__(self, signal: StoredSignal, like: Distribution) -> None:
        self._signal = signal
        self._room = Distribution(torch.empty_like(like.log_probs), torch.empty_like(like.probs))

    def main(self, rows: Tensor) -> Targets:
        return _Spread(self._signal.main.rows(rows), self._room)

    def mtp(self, rows: Tensor, counts: Tensor, main: Targets) -> Targets:
        return main if self._signal.mtp is None else _Spread(self._signal.mtp.rows(rows), self._room)


@dataclass(frozen=True)
class _Spread(Targets):
    """The stored rows of one chunk; room: [block, vocab], overwritten by each block."""

    chunk: TopTokens
    room: Distribution

    def distribution(self, block: slice, student: Distribution) -> Distribution:
        top = self.chunk.rows(block)
        return top.spread_like(student, self.room.rows(len(top.ids)))

    def most_likely(self, block: slice, distribution: Distribution) -> Tensor:
        return self.chunk.ids[block, :1]  # a token of the tail could look more likely where the student insists on it
