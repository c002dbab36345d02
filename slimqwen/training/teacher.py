"""What the student learns from, whatever gives it: the trainer sees only a `TeacherSignal` per micro-batch."""

from typing import Protocol

import torch

from slimqwen.data.stream import Batch
from slimqwen.losses.loss import align
from slimqwen.losses.signal import LiveSignal, TeacherSignal
from slimqwen.model.model import MtpCausalLM


class Teacher(Protocol):
    """Says what a teacher predicts on a batch, lined up with the student's predictions (`align`)."""

    def signal(self, batch: Batch) -> TeacherSignal: ...


class LiveTeacher:
    """A teacher that runs beside the student.

    teaches_mtp: the student's MTP head learns from the teacher's own MTP head and not from its main one.
    """

    def __init__(self, model: MtpCausalLM, *, teaches_mtp: bool) -> None:
        self.model = model
        self.teaches_mtp = teaches_mtp

    @torch.no_grad()
    def signal(self, batch: Batch) -> LiveSignal:
        """Its final hidden states and head; its logits exist only a chunk at a time, inside the loss."""
        hidden = self.model(batch.tokens, with_mtp=self.teaches_mtp)
        aligned = align(batch.tokens, hidden.main, hidden.mtp, batch.mask)
        return LiveSignal(aligned.hidden, self.model.head, aligned.mtp_hidden)
