"""The exponential moving average of a student's weights."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Exponential moving average of the weights: average = decay x average + (1 - decay) x weights.

    It begins as a copy of the weights, in their dtype (float32). It is kept in the optimiser's state, as "ema" of each
    parameter, and so is saved, resharded and loaded with it.
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
        """Add the current weights, after `steps` earlier updates; the decay is at most (1 + steps) / (10 + steps)."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        averages = [_local_shard(average) for average, _ in self.averages]
        weights = [_local_shard(parameter) for _, parameter in self.averages]
        get_ema_multi_avg_fn(decay)(averages, weights, None)

    @torch.no_grad()
    def copy_to_weights(self) -> None:
        """Overwrite the weights with their average."""
        for average, parameter in self.averages:
            parameter.copy_(average)


def _local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor; a tensor that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
