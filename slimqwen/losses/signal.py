"""A teacher's predictions on a batch: hidden states and a head to multiply, or its most likely tokens from disk.

Of either the loss takes targets of a chunk of predictions at a time (targets.py).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimqwen.losses.head import Logits, zero_where_not
from slimqwen.losses.targets import LiveTargets, StoredTargets, Targets, TopTokens

__all__ = ["ChunkedTeacher", "LiveSignal", "StoredSignal", "TeacherSignal", "TopTokens"]


class ChunkedTeacher(ABC):
    """A teacher's targets, chunk by chunk, in memory that the next chunk uses again."""

    @abstractmethod
    def targets(self, rows: Tensor, mtp_counts: Tensor | None) -> list[Targets]:
        """Return what the main head and the MTP head learn from about predictions `rows`, [chunk] int64, one object where it is the same.

        mtp_counts: [chunk] bool; what the MTP head learns of rows that are not in it may be garbage. None: there is no such head.
        """


class TeacherSignal(ABC):
    """A teacher's part of the N predictions of the student's `Predictions` (lined up with `align` too)."""

    @abstractmethod
    def cast(self, dtype: torch.dtype) -> "TeacherSignal":
        """Return the same with matrix products in `dtype`."""

    @abstractmethod
    def rows_per_token(self, with_mtp: bool) -> int:
        """Return how many rows of logits `chunks` keeps for each prediction; with_mtp: of a student with an MTP head."""

    @abstractmethod
    def chunks(self, student_head: Tensor, chunk_tokens: int, with_mtp: bool) -> ChunkedTeacher:
        """Return its targets of chunks of at most `chunk_tokens` predictions; student_head: [vocab, hidden]."""


@dataclass(frozen=True)
class LiveSignal(TeacherSignal):
    """Hidden states and head of a teacher that runs beside the student."""

    hidden: Tensor  # [N, teacher_hidden]
    head: Tensor  # [vocab, teacher_hidden], the teacher's lm_head
    mtp_hidden: Tensor | None = None  # [N, teacher_hidden]; None: the student's MTP head learns from `hidden` too

    def cast(self, dtype: torch.dtype) -> "LiveSignal":
        return replace(self, head=self.head.to(dtype))

    def rows_per_token(self, with_mtp: bool) -> int:
        return 2 if with_mtp and self.mtp_hidden is not None else 1

    def chunks(self, student_head: Tensor, chunk_tokens: int, with_mtp: bool) -> ChunkedTeacher:
        assert self.head.shape[0] == student_head.shape[0], "student and teacher must share a vocabulary"
        return _Projected(self, chunk_tokens * self.rows_per_token(with_mtp))


class _Projected(ChunkedTeacher):
    """The teacher's logits of one chunk, computed once for both heads where both learn from its main head."""

    def __init__(self, signal: LiveSignal, max_rows: int) -> None:
        self._signal = signal
        self._logits = Logits(signal.head, max_rows)

    def targets(self, rows: Tensor, mtp_counts: Tensor | None) -> list[Targets]:
        hidden, mtp_hidden = self._signal.hidden[rows], self._signal.mtp_hidden
        if mtp_counts is None:
            return [LiveTargets(self._logits.project(hidden)[0])]
        if mtp_hidden is None:
            return [LiveTargets(self._logits.project(hidden)[0])] * 2
        logits = self._logits.project(hidden, zero_where_not(mtp_counts, mtp_hidden[rows]))
        return [LiveTargets(logits[0]), LiveTargets(logits[1])]


@dataclass(frozen=True)
class StoredSignal(TeacherSignal):
    """The most likely tokens of a teacher that has run before."""

    main: TopTokens  # of N predictions, over the student's vocabulary
    mtp: TopTokens | None = None  # None: the student's MTP head learns from `main` too

    def cast(self, dtype: torch.dtype) -> "StoredSignal":
        return self  # there is no product

    def rows_per_token(self, with_mtp: bool) -> int:
        return 0

    def chunks(self, student_head: Tensor, chunk_tokens: int, with_mtp: bool) -> ChunkedTeacher:
        return _LookedUp(self)


@dataclass(frozen=True)
class _LookedUp(ChunkedTeacher):
    """The stored rows of one chunk."""

    signal: StoredSignal

    def targets(self, rows: Tensor, mtp_counts: Tensor | None) -> list[Targets]:
        main = StoredTargets(self.signal.main.rows(rows))
        if mtp_counts is None:
            return [main]
        return [main, main if self.signal.mtp is None else StoredTargets(self.signal.mtp.rows(rows))]
