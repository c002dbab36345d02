"""One output head, a chunk of tokens at a time: logits, losses and gradients over the vocabulary (see loss.py)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from slimqwen.losses.divergence import Distribution, Divergence, softmax_dtype

# How much of a chunk goes through softmax, divergence and gradient at one time. On a CPU the tensors of a block then come
# from the caches. One row (2^18) at a time was another tenth faster on one thread, but each of a row's twenty parallel
# steps waits for the slowest thread: with a third process on two cores it took ten times as long as 2^21. On a GPU blocks
# only bound the memory, to 0.3 GiB, and must be large enough to outlast the launch of their kernels.
CPU_BLOCK_ELEMENTS = 2**21
GPU_BLOCK_ELEMENTS = 2**24


class Logits:
    """A model's logits over one chunk, and their softmax over a block of it, in memory that the next ones use again.

    Memory fetched anew comes in pages that the system clears first: with it, a block took twice as long.
    """

    def __init__(self, head: Tensor, max_tokens: int) -> None:
        """head: [vocab, hidden]; max_tokens: rows of the largest chunk."""
        vocab = head.shape[0]
        elements = CPU_BLOCK_ELEMENTS if head.device.type == "cpu" else GPU_BLOCK_ELEMENTS
        self.head = head
        self.block_tokens = min(max(elements // vocab, 1), max_tokens)
        self.chunk = head.new_empty(max_tokens, vocab)
        room = torch.empty(self.block_tokens, vocab, dtype=softmax_dtype(head), device=head.device)
        self.block = Distribution(room, torch.empty_like(room))

    def project(self, hidden: Tensor) -> Tensor:
        """Fill the chunk from `hidden` [chunk, hidden]; returns it, [chunk, vocab], in the head's dtype."""
        return torch.mm(hidden.to(self.head.dtype), self.head.T, out=self.chunk[: hidden.shape[0]])

    def blocks(self, chunk_tokens: int) -> Iterator[slice]:
        """The chunk's rows, cut into blocks; one empty block for an empty chunk."""
        starts = range(0, max(chunk_tokens, 1), self.block_tokens)
        return (slice(start, min(start + self.block_tokens, chunk_tokens)) for start in starts)

    def softmax(self, block: slice) -> Distribution:
        """Of a block of the chunk."""
        logits = self.chunk[block]
        return Distribution.of(logits, out=self.block.rows(logits.shape[0]))


class TeacherChunk(ABC):
    """A teacher's distributions over the predictions of one chunk at a time."""

    @abstractmethod
    def turn_to(self, rows: Tensor) -> None:
        """Take up these predictions, [chunk] int64: what the main head learns from."""

    @abstractmethod
    def turn_to_mtp(self, rows: Tensor, counts: Tensor) -> None:
        """What the MTP head learns from, after `turn_to` the same rows; those not in `counts`, [chunk] bool, may be garbage."""

    @abstractmethod
    def distribution(self, block: slice, student: Distribution) -> Distribution:
        """Of a block of the chunk, [rows, vocab], valid until the next; `student`: what the student says there."""

    @abstractmethod
    def favourites(self, block: slice, distribution: Distribution) -> Tensor:
        """The most likely tokens, [rows, 1]; `distribution`: of this block."""


class HeadSums:
    """One head's sums and gradients over the chunks added so far.

    sums: [4] float64, over what `_add_block` returns for each row.
    tokens: how many rows they are sums over, float64.
    grad_hidden: [N, hidden], or None where not needed.
    grad_head: [vocab, hidden], of the main and the MTP head together, or None where not needed.
    """

    def __init__(
        self,
        student: Logits,
        teacher: TeacherChunk | None,
        divergence: Divergence,
        grad_head: Tensor | None,
        hidden: Tensor,
        lm_weight: float,
        kd_weight: float,
        needs_grad_hidden: bool,
        measures_top1: bool,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.divergence = divergence
        self.grad_head = grad_head
        self.hidden = hidden
        self.lm_weight = lm_weight
        self.kd_weight = kd_weight
        self.grad_hidden = torch.zeros_like(hidden) if needs_grad_hidden else None
        self.has_gradient = (needs_grad_hidden or grad_head is not None) and (lm_weight != 0.0 or kd_weight != 0.0)
        self.measures_top1 = measures_top1
        self.scratch = torch.empty_like(student.block.probs)
        self.sums = torch.zeros(4, dtype=torch.float64, device=hidden.device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=hidden.device)

    def add(self, rows: Tensor, counts: Tensor, labels: Tensor) -> None:
        """Add a chunk, which the teacher has turned to already.

        Args:
            rows: [chunk] int64, which rows of `hidden`.
            counts: [chunk] bool; the few rows that do not count are computed and left out of every sum, because leaving
                them out from the start would copy the chunk's teacher logits and wait for the device.
            labels: [chunk] int64.
        """
        head = self.student.head
        hidden = zero_where_not(counts, self.hidden[rows]).to(head.dtype)
        logits = self.student.project(hidden)
        per_row = torch.cat([self._add_block(block, labels[block]) for block in self.student.blocks(rows.numel())])
        self.sums += zero_where_not(counts, per_row).sum(0, dtype=torch.float64)
        self.tokens += counts.sum()
        if not self.has_gradient:
            return
        grad_logits = logits  # by now
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = zero_where_not(counts, grad_logits @ head).to(self.grad_hidden.dtype)
        if self.grad_head is not None:  # to which a row that does not count adds 0, as its hidden state is 0
            if self.grad_head.dtype == head.dtype:
                self.grad_head.addmm_(grad_logits.T, hidden)
            else:
                self.grad_head += grad_logits.T @ hidden

    def _add_block(self, block: slice, labels: Tensor) -> Tensor:
        """Losses of a few rows; where gradients are wanted, the student's logits become their own gradient.

        Returns:
            [rows, 4]: cross entropy with the label, KL(teacher || student), the divergence that the KD term minimises,
            and whether the teacher's most likely token is the student's too (0 or 1); 0 where not measured.
        """
        student = self.student.softmax(block)
        lm = -student.log_probs.gather(1, labels[:, None]).squeeze(1)
        kd = distance = top1 = torch.zeros_like(lm)
        kd_gradient = None
        if self.teacher is not None:
            teacher = self.teacher.distribution(block, student)
            scratch = self.scratch[: labels.shape[0]]
            kd = teacher.kl(student, scratch)
            if self.kd_weight != 0.0:
                distance, kd_gradient = self.divergence.value_and_gradient(teacher, student, scratch)
            if self.measures_top1:
                favourite = self.teacher.favourites(block, teacher)
                top1 = (student.log_probs.gather(1, favourite).squeeze(1) == student.log_probs.amax(1)).to(lm.dtype)
        if self.has_gradient:
            gradient = student.probs.mul_(self.lm_weight)
            gradient.scatter_add_(1, labels[:, None], torch.full_like(lm[:, None], -self.lm_weight))
            if kd_gradient is not None:
                gradient.add_(kd_gradient, alpha=self.kd_weight)
            self.student.chunk[block] = gradient
        return torch.stack([lm, kd, distance, top1], dim=1)

    def loss(self) -> Tensor:
        """The head's part of the loss, a float64 scalar."""
        lm, _, distance, _ = self.sums
        return self.lm_weight * lm + self.kd_weight * distance


def zero_where_not(counts: Tensor, rows: Tensor) -> Tensor:
    """`rows` [chunk, n] with zeros, not garbage times zero, where `counts` [chunk] is False."""
    return torch.where(counts[:, None], rows, 0)
