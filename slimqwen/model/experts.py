"""Experts functions with the results of Transformers' own.

One sums up what each expert does, one does not need all experts in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from slimqwen.core.stopwatch import Stopwatch
from slimqwen.model.internals import apply_gate, grouped_linear

OBSERVED_EXPERTS = "slimqwen_observed"
STREAMED_EXPERTS = "slimqwen_streamed"


@dataclass(frozen=True)
class ExpertsObserver:
    """Receives an experts module's sums (`add`, by name) and times them (`watch`)."""

    add: Callable[[str, Tensor], None]
    watch: Stopwatch


@dataclass(frozen=True)
class Pairs:
    """The (token, chosen expert) pairs of a batch, sorted by expert; on a tie in the order of the tokens.

    tokens: which token, [pairs]; order: which entry of the flattened [tokens, k] choice, [pairs]; gates: the weight of the
    expert's output, [pairs]; shares: the same, divided by the sum of the token's gates, float32, [pairs]; counts: pairs of
    each expert, [experts].
    """

    tokens: Tensor
    order: Tensor
    gates: Tensor
    shares: Tensor
    counts: Tensor

    @classmethod
    def of(cls, experts: Tensor, gates: Tensor, num_experts: int) -> "Pairs":
        """Sort the router's choice and its gates, both [tokens, k]."""
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        shares = gates.float() / gates.float().sum(dim=-1, keepdim=True)
        return cls(
            tokens=order // experts.shape[1],
            order=order,
            gates=gates.flatten()[order],
            shares=shares.flatten()[order],
            counts=torch.bincount(flat, minlength=num_experts),
        )

    def by_expert(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that was chosen, and where its pairs lie."""
        start = 0
        for expert, end in enumerate(self.counts.cumsum(0).tolist()):
            if end > start:
                yield expert, slice(start, end)
            start = end


def observed_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute routed experts as usual, and pass the sums of what they did on their tokens to `self.slimqwen_observer`.

    The sums are float32, over this batch: assignments, gate_sums and gated_norm_sums [experts], output_sums [experts,
    hidden], neuron_abs_sums [experts, expert neurons] (`Statistics` lists of what).

    Shapes: hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k].
    """
    observer: ExpertsObserver = self.slimqwen_observer
    pairs = Pairs.of(top_k_index, top_k_weights, self.num_experts)
    forward = one_by_one if hidden_states.device.type == "cpu" else grouped
    result = forward(self, hidden_states, pairs, observer)
    with observer.watch:
        observer.add("assignments", pairs.counts)
        observer.add("gate_sums", _per_expert(pairs.shares, pairs))
    return result


def streamed_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute routed experts as usual, on a CPU one after another, so that their weights need not be in memory (`each_expert`).

    Shapes as in `observed_experts_forward`.
    """
    if hidden_states.device.type != "cpu":
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    pairs = Pairs.of(top_k_index, top_k_weights, self.num_experts)
    result = torch.zeros_like(hidden_states, dtype=torch.float32)
    for _, rows, _, outputs in each_expert(self, hidden_states, pairs):
        result.index_add_(0, pairs.tokens[rows], outputs.mul_(pairs.gates[rows, None]))
    return result.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(OBSERVED_EXPERTS, observed_experts_forward)
ALL_EXPERTS_FUNCTIONS.register(STREAMED_EXPERTS, streamed_experts_forward)


def each_expert(experts: Any, x: Tensor, pairs: Pairs) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Yield each expert that was chosen, where its pairs lie, its neurons on their tokens and its outputs, the latter in float32.

    One expert's weights are read at a time, so they need not be in memory: `experts.gate_up_proj` is indexed and nothing
    else.
    """
    for expert, rows in pairs.by_expert():
        neurons = apply_gate(experts, F.linear(x[pairs.tokens[rows]], experts.gate_up_proj[expert]))
        yield expert, rows, neurons, F.linear(neurons, experts.down_proj[expert]).float()


def one_by_one(experts: Any, x: Tensor, pairs: Pairs, observer: ExpertsObserver) -> Tensor:
    """Compute expert after expert: on a CPU its outputs are still in the cache when they are summed up.

    There it is faster, sums included, than Transformers' grouped product without any (64 experts of Qwen3-Next-80B, 40 tokens
    each: 0.94 of its time; 160 tokens each: 0.81).
    """
    result = torch.zeros_like(x, dtype=torch.float32)
    gated_norms = torch.zeros(experts.num_experts)
    output_sums = torch.zeros(experts.num_experts, x.shape[1])
    neuron_sums = torch.zeros(experts.num_experts, experts.intermediate_dim)
    for expert, rows, neurons, outputs in each_expert(experts, x, pairs):
        with observer.watch:
            neuron_sums[expert] = neurons.float().abs().sum(dim=0)
            output_sums[expert] = outputs.sum(dim=0)
            gated_norms[expert] = pairs.shares[rows] @ outputs.norm(dim=-1)
        result.index_add_(0, pairs.tokens[rows], outputs.mul_(pairs.gates[rows, None]))
    with observer.watch:
        observer.add("gated_norm_sums", gated_norms)
        observer.add("output_sums", output_sums)
        observer.add("neuron_abs_sums", neuron_sums)
    return result.to(x.dtype)


def grouped(experts: Any, x: Tensor, pairs: Pairs, observer: ExpertsObserver) -> Tensor:
    """Compute all experts in two grouped products, as Transformers' `grouped_mm_experts_forward`: for a GPU."""
    offsets = pairs.counts.cumsum(0, dtype=torch.int32)
    neurons = apply_gate(experts, grouped_linear(x[pairs.tokens], experts.gate_up_proj, offsets))
    outputs = grouped_linear(neurons, experts.down_proj, offsets)
    with observer.watch:
        observer.add("gated_norm_sums", _per_expert(pairs.shares * outputs.float().norm(dim=-1), pairs))
        observer.add("output_sums", _per_expert(outputs.float(), pairs))
        observer.add("neuron_abs_sums", _per_expert(neurons.float().abs(), pairs))
    weighted = torch.empty_like(outputs)
    weighted[pairs.order] = outputs * pairs.gates[:, None]
    return weighted.unflatten(0, (len(x), -1)).sum(dim=1).to(x.dtype)


def _per_expert(values: Tensor, pairs: Pairs) -> Tensor:
    """Sum over the pairs of each expert: [pairs, ...] to [experts, ...], in the same order every time."""
    return torch.segment_reduce(values, "sum", lengths=pairs.counts)
