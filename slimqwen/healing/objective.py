"""The objective of a layer: the distance to the teacher's stream, or after the last layer to its predictions."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from slimqwen.layerwise.side_by_side import Target
from slimqwen.losses.loss import LossWeights, Predictions, chunked_loss
from slimqwen.losses.signal import LiveSignal

CHUNK_TOKENS = 256  # rows of logits at one time
KD_ALONE = LossWeights(lm=0.0, kd=1.0, mtp_lm=0.0, mtp_kd=0.0)


class Objective(ABC):
    """A sum over tokens that training lowers. name: of the number that `in_words` formats."""

    name: str

    @abstractmethod
    def total(self, output: Tensor, rows: Tensor) -> Tensor:
        """Return the sum over these rows, a scalar, differentiable in the layer's output for them, [rows, seq, hidden]."""

    def in_words(self, mean: float) -> str:
        """Format a mean over tokens for people."""
        return f"{mean:.3f}"


class StreamError(Objective):
    """The relative squared error |y - t|^2 / |t|^2, y the student's stream and t the teacher's in the student's coordinates.

    Relative, because the stream grows by orders of magnitude over the layers, and at the first tokens of a text by more.
    """

    name = "error"

    def __init__(self, target: Target, device: torch.device) -> None:
        self._target, self._device = target, device

    def total(self, output: Tensor, rows: Tensor) -> Tensor:
        wanted = self._target[rows].to(self._device)
        squares = wanted.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        return ((output.float() - wanted).square().sum(dim=-1) / squares).sum()

    def in_words(self, mean: float) -> str:
        return f"{math.sqrt(mean):.3f}"


class PredictionError(Objective):
    """KL(teacher || student) of the next token, in nats: after the last layer nothing follows that could correct an error.

    norm: the student's final norm. head, teacher_head: both lm_heads, [vocab, hidden] of each model. teacher_hidden: what goes into
    the teacher's for some rows, [rows, seq, teacher's hidden].
    """

    name = "kl"

    def __init__(
        self,
        norm: Callable[[Tensor], Tensor],
        head: Tensor,
        teacher_hidden: Callable[[Tensor], Tensor],
        teacher_head: Tensor,
    ) -> None:
        self._norm, self._head = norm, head
        self._teacher_hidden, self._teacher_head = teacher_hidden, teacher_head

    def total(self, output: Tensor, rows: Tensor) -> Tensor:
        hidden = self._norm(output.float()).flatten(0, 1)
        everywhere = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        labels = torch.zeros(
            len(hidden), dtype=torch.int64, device=hidden.device
        )  # unused: the weight of the data's loss is 0
        predictions = Predictions(labels, hidden, everywhere, None, ~everywhere)
        teacher = LiveSignal(self._teacher_hidden(rows).flatten(0, 1).to(self._teacher_head), self._teacher_head)
        loss, _ = chunked_loss(predictions, self._head, KD_ALONE, teacher=teacher, chunk_tokens=CHUNK_TOKENS)
        return loss
