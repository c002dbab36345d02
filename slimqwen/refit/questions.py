"""What the networks of a layer are asked on a text, and what each makes of it up to its output matrix."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimqwen.model.experts import Pairs
from slimqwen.refit.matrices import Network


class Questions:
    """Gathered pass by pass, on the CPU. hidden_states: the file-backed [tokens, hidden] that the inputs are written to."""

    def __init__(self, hidden_states: Tensor) -> None:
        self._hidden_states = hidden_states
        self._written = 0
        self._gates: list[Tensor] = []  # of the dense networks, [tokens, networks]
        self._chosen: list[Tensor] = []  # routed experts, [tokens, k]
        self._chosen_gates: list[Tensor] = []

    def add(self, asked: Tensor, gates: Tensor) -> None:
        """What all are asked, [..., hidden], and the weights of the dense networks' answers, [..., networks]."""
        asked = asked.flatten(0, -2)
        self._hidden_states[self._written : self._written + len(asked)] = asked.cpu().float()
        self._written += len(asked)
        self._gates.append(gates.flatten(0, -2).cpu().float())

    def add_choice(self, chosen: Tensor, gates: Tensor) -> None:
        """Which routed experts answer, and the weights of their answers, both [tokens, k]."""
        self._chosen.append(chosen.cpu())
        self._chosen_gates.append(gates.cpu().float())

    def to_dense(self, number: int, network: Any, writer: Any) -> Network:
        """One of the dense networks; `writer` is the module in it that holds its output matrix."""
        gates = torch.cat([part[:, number] for part in self._gates])
        return Network(partial(_neurons, network, writer), self._hidden_states, torch.arange(len(gates)), gates)

    def to_experts(self, experts: Any) -> list[Network]:
        """Each expert of Transformers' module, of which `gate_up_proj[expert]` and the activation are used."""
        pairs = Pairs.of(torch.cat(self._chosen), torch.cat(self._chosen_gates), experts.num_experts)
        ends = pairs.counts.cumsum(0).tolist()
        return [
            Network(
                partial(_expert_neurons, experts, expert),
                self._hidden_states,
                pairs.tokens[start:end],
                pairs.gates[start:end],
            )
            for expert, (start, end) in enumerate(pairwise([0, *ends]))
        ]


@contextmanager
def answering(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, this module computes something else."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _neurons(network: Any, writer: Any, hidden_states: Tensor) -> Tensor:
    with answering(writer, _itself):
        neurons: Tensor = network(hidden_states.to(writer.weight))
        return neurons


def _itself(neurons: Tensor) -> Tensor:
    return neurons


def _expert_neurons(experts: Any, expert: int, hidden_states: Tensor) -> Tensor:
    weight = experts.gate_up_proj[expert]
    neurons: Tensor = experts._apply_gate(F.linear(hidden_states.to(weight), weight))
    return neurons
