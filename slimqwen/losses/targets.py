"""What a student learns of a block of predictions: its labels, and a teacher's distributions by the forward KL.

`learn` is the arithmetic of `forward_kl` and cross entropy in few passes over a block, and the kernel of kernel.py is its like.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slimqwen.losses.divergence import Distribution
from slimqwen.losses.softmax import Room, Softmax, most_likely


@dataclass(frozen=True)
class Lesson:
    """How a head's gradient is weighed: lm_weight (softmax(student) - onehot(label)) + kd_weight (softmax(student) - teacher).

    labels: [rows] int64. wants_gradient: whether the student's logits become their own gradient.
    """

    labels: Tensor
    lm_weight: float
    kd_weight: float
    wants_gradient: bool

    def without_teacher(self, student: Softmax) -> None:
        """Write the gradient of the cross entropy over the student's logits."""
        if self.wants_gradient:
            student.logits.copy_(self.subtract_label(student.probs.mul_(self.lm_weight)))

    def subtract_label(self, gradient: Tensor, divided_by: float = 1.0) -> Tensor:
        """Subtract lm_weight onehot(label) from `gradient` [rows, vocab], which is returned; divided_by: of the gradient."""
        share = gradient.new_full((len(gradient), 1), -self.lm_weight / divided_by)
        return gradient.scatter_add_(1, self.labels[:, None], share)


class BlockTargets(ABC):
    """A teacher's distributions over the predictions of a block."""

    @abstractmethod
    def learn(self, student: Softmax, lesson: Lesson) -> Tensor:
        """Return KL(teacher || student), [rows] float64; write the gradient over the student's logits if it is wanted.

        Of `student` nothing may be used afterwards where a gradient is wanted.
        """

    @abstractmethod
    def distribution(self, student: Distribution) -> Distribution:
        """Return the distributions over the vocabulary, [rows, vocab]; student: the student's of this block."""

    @property
    @abstractmethod
    def most_likely(self) -> Tensor:
        """The most likely token of each row, [rows, 1]."""


class Targets(ABC):
    """A teacher's distributions over the predictions of one chunk."""

    @abstractmethod
    def block(self, block: slice, room: Room) -> BlockTargets:
        """Return those of a block of the chunk, valid until the next."""


@dataclass(frozen=True)
class LiveTargets(Targets):
    """A chunk's logits, [chunk, vocab], of a teacher that runs beside the student."""

    logits: Tensor

    def block(self, block: slice, room: Room) -> BlockTargets:
        logits = self.logits[block]
        return _LiveBlock(Softmax(logits, room.teacher[: len(logits)]), room)


@dataclass(frozen=True)
class _LiveBlock(BlockTargets):
    softmax: Softmax
    room: Room

    def learn(self, student: Softmax, lesson: Lesson) -> Tensor:
        """Compute KL = sum_v p_v (x_v - y_v) - (log sum_v exp x_v - log sum_v exp y_v), x and y the teacher's and student's logits.

        It is exactly 0 between equal logits.
        """
        difference = self.room.scratch[: len(student.logits)]
        if difference.dtype == student.logits.dtype == self.softmax.logits.dtype:
            torch.sub(self.softmax.logits, student.logits, out=difference)
        else:  # half of the digits would be gone before they are subtracted
            difference.copy_(self.softmax.logits).sub_(student.logits)
        weighted = difference.mul_(self.softmax.probs).sum(1)
        kl = weighted.double() - (self.softmax.log_sum - student.log_sum)
        if lesson.wants_gradient:
            both = lesson.lm_weight + lesson.kd_weight  # with the KL alone nothing is left between equals: p - 1.0 p
            gradient = lesson.subtract_label(student.probs, divided_by=both)
            gradient.sub_(self.softmax.probs, alpha=lesson.kd_weight / both)
            torch.mul(gradient, both, out=student.logits)
        return kl

    def distribution(self, student: Distribution) -> Distribution:
        return self.softmax.distribution()

    @property
    def most_likely(self) -> Tensor:
        return most_likely(self.softmax.logits)


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
        return cls(ids, log_probs, log_of_the_rest(distribution.probs, ids))

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
        stretch = self.log_tail.to(probs.dtype) - log_of_the_rest(probs, self.ids)
        log_probs = self.log_probs.to(probs.dtype)
        probs.mul_(stretch.exp()[:, None]).scatter_(1, self.ids, log_probs.exp())
        torch.add(student.log_probs, stretch[:, None], out=out.log_probs).scatter_(1, self.ids, log_probs)
        return out


def log_of_the_rest(probs: Tensor, ids: Tensor) -> Tensor:
    """Return the logarithm of what is left beside the tokens `ids` [rows, k], whose entries of `probs` [rows, vocab] become 0; [rows].

    Summed up and not 1 minus the others, which in float32 has no digit left where the tail is 1e-7. Of nothing it is -87,
    and not minus infinity: 0 times that would be NaN.
    """
    rest = probs.scatter_(1, ids, 0.0).sum(1)
    return rest.clamp_min(torch.finfo(torch.float32).tiny).log()


@dataclass(frozen=True)
class StoredTargets(Targets):
    """The most likely tokens of a teacher that has run before, of one chunk."""

    top: TopTokens

    def block(self, block: slice, room: Room) -> BlockTargets:
        return _StoredBlock(self.top.rows(block))


@dataclass(frozen=True)
class _StoredBlock(BlockTargets):
    top: TopTokens

    def learn(self, student: Softmax, lesson: Lesson) -> Tensor:
        """Compute the KL of the coarse partition (`TopTokens.spread_like`): only the student's tail needs the vocabulary."""
        ids, q = self.top.ids, student.probs
        log_q, q_top = student.log_probs_at(ids), q.gather(1, ids)
        log_p, log_p_tail = self.top.log_probs.to(q.dtype), self.top.log_tail.to(q.dtype)
        stretch = log_p_tail - log_of_the_rest(q, ids)  # of every tail token, log(p~ / q)
        p = log_p.exp()
        kl = (p * (log_p - log_q)).sum(1, dtype=torch.float64) + (log_p_tail.exp() * stretch).double()
        if not lesson.wants_gradient:
            q.scatter_(1, ids, q_top)
            return kl
        both = lesson.lm_weight + lesson.kd_weight
        q.mul_((both - lesson.kd_weight * stretch.exp())[:, None]).scatter_(1, ids, both * q_top - lesson.kd_weight * p)
        student.logits.copy_(lesson.subtract_label(q))
        return kl

    def distribution(self, student: Distribution) -> Distribution:
        return self.top.spread_like(student, Distribution(*(torch.empty_like(part) for part in student)))

    @property
    def most_likely(self) -> Tensor:
        return self.top.ids[:, :1]  # a token of the tail could look more likely where the student insists on it
