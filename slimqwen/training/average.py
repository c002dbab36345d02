"""The exponential moving average of a student's weights."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """average = decay x average + (1 - decay) x weights, from the weights at the beginning on, in their dtype (float32).

    It is kept in the optimiser's state, as "ema" of each parameter, and is so saved, resharded and read again with it.
    """

    @torch.no_grad()
    def __init__(self, parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.decay = decay
        self.averages: list[tuple[Tensor, Tensor]] = []
        for parameter in parameters:
            average = parameter.detach().clone()
            optimizer.state[parameter]["ema"] = average
            self.averages.append((average, parameter))

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Add the weights of now. steps: those before this one; the decay is at most (1 + steps) / (10 + steps)."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        averages = [_own(average) for average, _ in self.averages]
        weights = [_own(parameter) for _, parameter in self.averages]
        get_ema_multi_avg_fn(decay)(averages, weights, None)

    @torch.no_grad()
    def take(self) -> None:
        """Put the average in the weights' place."""
        for average, parameter in self.averages:
            parameter.copy_(average)


def _own(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
