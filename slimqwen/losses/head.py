"""One output head, a chunk of tokens at a time: logits, losses and gradients over the vocabulary (see loss.py)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from slimqwen.losses.blocks import block_rows
from slimqwen.losses.divergence import Distribution, Divergence, softmax_dtype


class Logits:
    """Buffers of a model's logits over one chunk and of their softmax over a block of it, which the next ones overwrite.

    Memory allocated anew comes in pages that the system clears first: with it, a block took twice as long.
    """

    def __init__(self, head: Tensor, max_tokens: int) -> None:
        """Allocate the buffers. head: [vocab, hidden]; max_tokens: rows of the largest chunk."""
        vocab = head.shape[0]
        self.head = head
        self.block_tokens = block_rows(vocab, max_tokens, on_cpu=head.device.type == "cpu")
        self.chunk = head.new_empty(max_tokens, vocab)
        room = torch.empty(self.block_tokens, vocab, dtype=softmax_dtype(head), device=head.device)
        self.block = Distribution(room, torch.empty_like(room))

    def project(self, hidden: Tensor) -> Tensor:
        """Fill the chunk from `hidden` [chunk, hidden] and return it, [chunk, vocab], in the head's dtype."""
        return torch.mm(hidden.to(self.head.dtype), self.head.T, out=self.chunk[: hidden.shape[0]])

    def blocks(self, chunk_tokens: int) -> Iterator[slice]:
        """Return the chunk's rows, cut into blocks; one empty block for an empty chunk."""
        starts = range(0, max(chunk_tokens, 1), self.block_tokens)
        return (slice(start, min(start + self.block_tokens, chunk_tokens)) for start in starts)

    def softmax(self, block: slice) -> Distribution:
        """Compute the softmax of a block of the chunk."""
        logits = self.chunk[block]
        return Distribution.of(logits, out=self.block.rows(logits.shape[0]))


class Targets(ABC):
    """A teacher's distributions over the predictions of one chunk, a block of them at a time."""

    @abstractmethod
    def distribution(self, block: slice, student: Distribution) -> Distribution:
        """Return those of a block of the chunk, [rows, vocab], valid until the next; student: the student's of this block."""

    @abstractmethod
    def most_likely(self, block: slice, distribution: Distribution) -> Tensor:
        """Return the most likely token of each row, [rows, 1]; distribution: of this block."""


class ChunkedTeacher(ABC):
    """A teacher's targets, chunk by chunk, in memory that the next chunk uses again."""

    @abstractmethod
    def main(self, rows: Tensor) -> Targets:
        """Return what the main head learns from about these predictions, [chunk] int64; valid until the next call of either."""

    @abstractmethod
    def mtp(self, rows: Tensor, counts: Tensor, main: Targets) -> Targets:
        """Return what the MTP head learns from, which may be `main`, that head's of the same rows.

        Rows that are not in `counts`, [chunk] bool, may be garbage.
        """


@dataclass(frozen=True)
class Chunk:
    """Predictions that go through the vocabulary together.

    rows: [chunk] int64, which rows of the head's hidden states.
    counts: [chunk] bool; the few rows that do not count are computed and left out of every sum, because leaving
        them out from the start would copy the chunk's teacher logits and wait for the device.
    labels: [chunk] int64.
    targets: the teacher's; None without one.
    """

    rows: Tensor
    counts: Tensor
    labels: Tensor
    targets: Targets | None


@dataclass(frozen=True)
class HeadTerm:
    """One head's part of the loss, lm_weight * sum CE + kd_weight * sum divergence, and where its gradients go.

    hidden: [N, hidden], the head's inputs.
    grad_hidden: [N, hidden], zeros that `add` fills; None where not needed.
    grad_head: [vocab, hidden], which `add` adds to, of the main and the MTP head together; None where not needed.
    scratch: [block, vocab], overwritten by each block.
    """

    hidden: Tensor
    lm_weight: float
    kd_weight: float
    divergence: Divergence
    measures_top1: bool
    grad_hidden: Tensor | None
    grad_head: Tensor | None
    scratch: Tensor

    @property
    def has_gradient(self) -> bool:
        """Whether anything of the term is to be differentiated."""
        wanted = self.grad_hidden is not None or self.grad_head is not None
        return wanted and (self.lm_weight != 0.0 or self.kd_weight != 0.0)

    def loss(self, sums: Tensor) -> Tensor:
        """Return the head's part of the loss, a float64 scalar, from the sums of all chunks."""
        lm, _, distance, _ = sums
        return self.lm_weight * lm + self.kd_weight * distance

    def add(self, student: Logits, chunk: Chunk) -> Tensor:
        """Add a chunk's gradients to theirs; return its sums, [4] float64, over what `_block` returns for each row."""
        head = student.head
        hidden = zero_where_not(chunk.counts, self.hidden[chunk.rows]).to(head.dtype)
        logits = student.project(hidden)
        per_row = torch.cat([self._block(student, chunk, block) for block in student.blocks(chunk.rows.numel())])
        sums = zero_where_not(chunk.counts, per_row).sum(0, dtype=torch.float64)
        if not self.has_gradient:
            return sums
        grad_logits = logits  # by now
        if self.grad_hidden is not None:
            grad_rows = zero_where_not(chunk.counts, grad_logits @ head)
            self.grad_hidden[chunk.rows] = grad_rows.to(self.grad_hidden.dtype)
        if self.grad_head is not None:  # to which a row that does not count adds 0, as its hidden state is 0
            if self.grad_head.dtype == head.dtype:
                self.grad_head.addmm_(grad_logits.T, hidden)
            else:
                self.grad_head.add_(grad_logits.T @ hidden)
        return sums

    def _block(self, logits: Logits, chunk: Chunk, block: slice) -> Tensor:
        """Compute the losses of a few rows; where gradients are wanted, the student's logits become their own gradient.

        Returns:
            [rows, 4]: cross entropy with the label, KL(teacher || student), the divergence that the KD term minimises,
            and whether the teacher's most likely token is the student's too (0 or 1); 0 where not measured.
        """
        labels = chunk.labels[block]
        student = logits.softmax(block)
        lm = -student.log_probs.gather(1, labels[:, None]).squeeze(1)
        kd = distance = top1 = torch.zeros_like(lm)
        kd_gradient = None
        if chunk.targets is not None:
            teacher = chunk.targets.distribution(block, student)
            scratch = self.scratch[: labels.shape[0]]
            kd = teacher.kl(student, scratch)
            if self.kd_weight != 0.0:
                distance, kd_gradient = self.divergence.value_and_gradient(teacher, student, scratch)
            if self.measures_top1:
                likely = chunk.targets.most_likely(block, teacher)
                top1 = (student.log_probs.gather(1, likely).squeeze(1) == student.log_probs.amax(1)).to(lm.dtype)
        if self.has_gradient:
            gradient = student.probs.mul_(self.lm_weight)
            gradient.scatter_add_(1, labels[:, None], torch.full_like(lm[:, None], -self.lm_weight))
            if kd_gradient is not None:
                gradient.add_(kd_gradient, alpha=self.kd_weight)
            logits.chunk[block] = gradient
        return torch.stack([lm, kd, distance, top1], dim=1)


def zero_where_not(counts: Tensor, rows: Tensor) -> Tensor:
    """Return `rows` [chunk, n] with zeros, not garbage times zero, where `counts` [chunk] is False."""
    return torch.where(counts[:, None], rows, 0)
