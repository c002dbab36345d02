"""Output heads that share a matrix, a chunk of tokens at a time: logits, losses and gradients over the vocabulary (see loss.py)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slimqwen.losses import kernel
from slimqwen.losses.divergence import Distribution, Divergence
from slimqwen.losses.products import add_product
from slimqwen.losses.softmax import Room, Softmax
from slimqwen.losses.targets import BlockTargets, Lesson, Targets


class Logits:
    """Buffers of a model's logits over one chunk and of their softmax over a block of it, which the next ones overwrite."""

    def __init__(self, head: Tensor, max_rows: int) -> None:
        """Allocate the chunk's. head: [vocab, hidden]; max_rows: rows of the largest chunk."""
        self.head = head
        self.chunk = head.new_empty(max_rows, head.shape[0])
        self.room = Room.of(self.chunk)

    def project(self, *hidden: Tensor) -> Tensor:
        """Fill the chunk from the hidden states of some heads, each [rows, hidden]; return [heads, rows, vocab] in the head's dtype.

        One product for each, of the shape of the teacher's: a model compared with itself has the same logits then, to the bit.
        """
        rows = len(hidden[0])
        logits = self.chunk[: len(hidden) * rows].view(len(hidden), rows, self.head.shape[0])
        for number, states in enumerate(hidden):
            torch.mm(states.to(self.head.dtype), self.head.T, out=logits[number])
        return logits

    def blocks(self, rows: int) -> Iterator[slice]:
        """Return a chunk's rows, cut into blocks; one empty block for an empty chunk."""
        starts = range(0, max(rows, 1), self.room.rows)
        return (slice(start, min(start + self.room.rows, rows)) for start in starts)

    @cached_property
    def _distribution(self) -> Distribution:
        return Distribution(self.room.scratch, self.room.student)

    def softmax(self, block: slice) -> Distribution:
        """Compute the softmax of a block of the chunk, with its logarithms."""
        logits = self.chunk[block]
        return Distribution.of(logits, out=self._distribution.rows(logits.shape[0]))


@dataclass(frozen=True)
class HeadTerm:
    """One head's part of the loss, lm_weight * sum CE + kd_weight * sum divergence, and where its gradient goes.

    hidden: [N, hidden], the head's inputs.
    counts: [N] bool. The few rows of a chunk that do not count are computed and left out of every sum, because leaving
        them out from the start would copy the chunk's teacher logits and wait for the device.
    grad_hidden: [N, hidden], zeros that `Heads.add` fills; None where not needed.
    """

    hidden: Tensor
    counts: Tensor
    lm_weight: float
    kd_weight: float
    measures_top1: bool
    grad_hidden: Tensor | None

    @property
    def has_weight(self) -> bool:
        """Whether the term is part of the loss."""
        return self.lm_weight != 0.0 or self.kd_weight != 0.0

    def loss(self, sums: Tensor) -> Tensor:
        """Return the head's part of the loss, a float64 scalar, from the sums of all chunks."""
        lm, _, distance, _ = sums
        return self.lm_weight * lm + self.kd_weight * distance


@dataclass(frozen=True)
class Heads:
    """All heads of the student. A chunk's rows of the first stand before those of the second, and their gradients are one product.

    student: buffers for that many rows.
    grad_head: [vocab, hidden], which `add` adds to, of all heads together; None where not needed.
    """

    terms: Sequence[HeadTerm]
    student: Logits
    divergence: Divergence
    grad_head: Tensor | None

    def has_gradient(self, term: HeadTerm) -> bool:
        """Return whether anything of a term is to be differentiated."""
        return term.has_weight and (term.grad_hidden is not None or self.grad_head is not None)

    def _weights(self, term: HeadTerm) -> tuple[float, ...]:
        return (term.lm_weight, term.kd_weight) if self.has_gradient(term) else ()

    def add(self, rows: Tensor, labels: Tensor, targets: Sequence[Targets | None]) -> Tensor:
        """Add a chunk's gradients to theirs; return its sums, [heads, 4] float64, over what `losses_of_block` returns for each row.

        rows: [chunk] int64, the predictions. labels: [chunk] int64. targets: the teacher's, of each head.
        """
        head, chunk = self.student.head, rows.numel()
        counts = torch.cat([term.counts[rows] for term in self.terms])
        hidden = torch.cat([term.hidden[rows] for term in self.terms])
        hidden = zero_where_not(counts, hidden).to(head.dtype)
        logits = self.student.project(*hidden.view(len(self.terms), chunk, hidden.shape[1]))
        per_row = self._losses(logits, labels, targets)
        sums = torch.where(counts.view(len(self.terms), chunk, 1), per_row, 0).sum(1, dtype=torch.float64)

        places = [number for number, term in enumerate(self.terms) if self.has_gradient(term)]
        if not places:
            return sums
        some = slice(places[0] * chunk, (places[-1] + 1) * chunk)  # of two heads, both or one
        grad_logits = logits.flatten(0, 1)[some]  # by now
        terms = [self.terms[place] for place in places]
        if any(term.grad_hidden is not None for term in terms):
            grad_rows = zero_where_not(counts[some], grad_logits @ head)
            for number, term in enumerate(terms):
                if term.grad_hidden is not None:
                    part = grad_rows[number * chunk : (number + 1) * chunk]
                    term.grad_hidden[rows] = part.to(term.grad_hidden.dtype)
        if self.grad_head is not None:  # to which a row that does not count adds 0, as its hidden state is 0
            add_product(self.grad_head, grad_logits.T, hidden[some])
        return sums

    def _losses(self, logits: Tensor, labels: Tensor, targets: Sequence[Targets | None]) -> Tensor:
        """Compute the losses of a chunk, [heads, chunk, 4]; where gradients are wanted, logits become their own gradient.

        logits: [heads, chunk, vocab].
        """
        if kernel.serves(logits, self.divergence):
            work = zip(self.terms, targets, logits, strict=True)
            return torch.stack([kernel.run(its, labels, own, self._weights(term)) for term, own, its in work])
        found = []
        for block in self.student.blocks(labels.numel()):
            last: Targets | None = None
            known: BlockTargets | None = None
            for term, own, its_logits in zip(self.terms, targets, logits, strict=True):
                if own is not None and own is not last:  # else its softmax is there already
                    last, known = own, own.block(block, self.student.room)
                found.append(self.losses_of_block(term, its_logits[block], labels[block], known))
        heads = len(self.terms)
        return torch.stack([torch.cat(found[number::heads]) for number in range(heads)])

    def losses_of_block(self, term: HeadTerm, logits: Tensor, labels: Tensor, teacher: BlockTargets | None) -> Tensor:
        """Compute the losses of a few rows of one head.

        Returns:
            [rows, 4] float64: cross entropy with the label, KL(teacher || student), the divergence that the KD term minimises,
            and whether the teacher's most likely token is the student's too (0 or 1); 0 where not measured.
        """
        student = Softmax(logits, self.student.room.student[: len(logits)])
        lm = -student.log_probs_at(labels[:, None]).squeeze(1).double()
        kd = distance = top1 = torch.zeros_like(lm)
        wants_gradient = self.has_gradient(term)
        if teacher is not None and term.measures_top1:
            top1 = (logits.gather(1, teacher.most_likely) == student.largest).squeeze(1).to(lm.dtype)
        if teacher is None:
            Lesson(labels, term.lm_weight, 0.0, wants_gradient).without_teacher(student)
        elif term.kd_weight == 0.0 or self.divergence.is_forward_kl:
            lesson = Lesson(labels, term.lm_weight, term.kd_weight, wants_gradient)
            kd = distance = teacher.learn(student, lesson)
        else:
            kd = teacher.learn(student, Lesson(labels, 0.0, 0.0, wants_gradient=False))
            q = student.distribution()
            distance, kd_gradient = self.divergence.value_and_gradient(teacher.distribution(q), q)
            if wants_gradient:
                kd_gradient.mul_(term.kd_weight).add_(student.probs, alpha=term.lm_weight)
                logits.copy_(Lesson(labels, term.lm_weight, 0.0, wants_gradient).subtract_label(kd_gradient))
        return torch.stack([lm, kd, distance.double(), top1], dim=1)


def zero_where_not(counts: Tensor, rows: Tensor) -> Tensor:
    """Return `rows` [chunk, n] with zeros, not garbage times zero, where `counts` [chunk] is False."""
    return torch.where(counts[:, None], rows, 0)
