"""The teacher as the trainer sees it, live or cached: one `TeacherSignal` per micro-batch."""

from collections.abc import Callable
from typing import Protocol

import torch

from slimqwen.data.stream import Batch
from slimqwen.losses.loss import align
from slimqwen.losses.signal import LiveSignal, TeacherSignal
from slimqwen.model.model import MtpCausalLM


def ignore() -> None:
    """Do nothing."""


class Teacher(Protocol):
    """Source of a teacher's distributions."""

    def prepare(self, batch: Batch, pause: Callable[[], None] = ignore) -> None:
        """Get ready for the signals of these rows, a micro-batch at a time. It may do nothing: the signals are the same.

        pause: called now and then where that takes long; what it raises leaves nothing prepared.
        """
        ...

    def signal(self, batch: Batch) -> TeacherSignal:
        """Return the teacher's distributions on a batch, aligned with the student's predictions (`align`)."""
        ...


class LiveTeacher:
    """Teacher that runs beside the student.

    teaches_mtp: the student's MTP head learns from the teacher's MTP head, and not from its main head.
    """

    def __init__(self, model: MtpCausalLM, *, teaches_mtp: bool) -> None:
        self.model = model
        self.teaches_mtp = teaches_mtp

    def prepare(self, batch: Batch, pause: Callable[[], None] = ignore) -> None:
        pass

    @torch.no_grad()
    def signal(self, batch: Batch) -> LiveSignal:
        """Return final hidden states and head; logits exist only a chunk at a time, inside the loss."""
        hidden = self.model(batch.tokens, with_mtp=self.teaches_mtp)
        aligned = align(batch.tokens, hidden.main, hidden.mtp, batch.mask)
        return LiveSignal(aligned.hidden, self.model.head, aligned.mtp_hidden)
