"""The inputs of a layer's networks on a text, recorded, and each network up to its output matrix as a `Network`."""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimqwen.model.experts import Pairs
from slimqwen.model.internals import apply_gate
from slimqwen.model.patching import overridden
from slimqwen.refit.matrices import Network


class RecordedInputs:
    """Inputs and gates of a layer's networks, recorded pass by pass on the CPU.

    hidden_states: the file-backed [tokens, hidden] that the inputs are written to. device: of the networks.
    """

    def __init__(self, hidden_states: Tensor, device: torch.device) -> None:
        self._hidden_states, self._device = hidden_states, device
        self._written = 0
        self._gates: list[Tensor] = []  # of the dense networks, [tokens, networks]
        self._chosen: list[Tensor] = []  # routed experts, [tokens, k]
        self._chosen_gates: list[Tensor] = []

    def add(self, inputs: Tensor, gates: Tensor) -> None:
        """Record the input of all networks, [..., hidden], and the gates of the dense ones' outputs, [..., networks]."""
        inputs = inputs.flatten(0, -2)
        self._hidden_states[self._written : self._written + len(inputs)] = inputs.cpu().float()
        self._written += len(inputs)
        self._gates.append(gates.flatten(0, -2).cpu().float())

    def add_choice(self, chosen: Tensor, gates: Tensor) -> None:
        """Record the chosen experts, and the gates of their outputs, both [tokens, k]."""
        self._chosen.append(chosen.cpu())
        self._chosen_gates.append(gates.cpu().float())

    def to_dense(self, number: int, network: Any, writer: Any) -> Network:
        """Return one of the dense networks; `writer` is the module in it that holds its output matrix."""
        gates = torch.cat([torch.zeros(0), *(part[:, number] for part in self._gates)])
        neurons = partial(_compute_neurons, network, writer)
        return Network(neurons, self._hidden_states, torch.arange(len(gates)), gates, self._device)

    def to_experts(self, experts: Any) -> list[Network]:
        """Return each expert of Transformers' module, of which `gate_up_proj[expert]` and the activation are used."""
        chosen = torch.cat(self._chosen) if self._chosen else torch.zeros(0, 1, dtype=torch.int64)
        gates = torch.cat(self._chosen_gates) if self._chosen else torch.zeros(0, 1)
        pairs = Pairs.of(chosen, gates, experts.num_experts)
        ends = pairs.counts.cumsum(0).tolist()
        return [
            Network(
                partial(_compute_expert_neurons, experts, expert),
                self._hidden_states,
                pairs.tokens[start:end],
                pairs.gates[start:end],
                self._device,
            )
            for expert, (start, end) in enumerate(pairwise([0, *ends]))
        ]


def _compute_neurons(network: Any, writer: Any, hidden_states: Tensor) -> Tensor:
    with overridden(writer, forward=_identity):
        neurons: Tensor = network(hidden_states.to(writer.weight))
        return neurons


def _identity(neurons: Tensor) -> Tensor:
    return neurons


def _compute_expert_neurons(experts: Any, expert: int, hidden_states: Tensor) -> Tensor:
    weight = experts.gate_up_proj[expert]
    return apply_gate(experts, F.linear(hidden_states.to(weight), weight))
