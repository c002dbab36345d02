"""Hooks and an experts function that gather statistics while Transformers' own forward pass runs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from slimqwen.calibration.statistics import Statistics
from slimqwen.families import Config, Family
from slimqwen.modeling.model import MtpCausalLM
from slimqwen.modeling.routing import Routing, module_of

OBSERVED_EXPERTS = "slimqwen_observed"


def observed_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Routed experts as usual, and `self.slimqwen_observer(outputs, top_k_index, top_k_weights)` told of each output.

    Every (token, chosen expert) pair is handed to the grouped matrix product as a token of its own with weight 1, so
    each expert's unweighted output comes back, and no expert runs on a token that was not routed to it.

    Shapes: hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k]; outputs [tokens, k, hidden].
    """
    tokens, k = top_k_index.shape
    pairs = hidden_states.repeat_interleave(k, dim=0)
    ones = torch.ones_like(top_k_weights).reshape(-1, 1)
    outputs = grouped_mm_experts_forward(self, pairs, top_k_index.reshape(-1, 1), ones).view(tokens, k, -1)
    observer: Any = self.slimqwen_observer
    observer(outputs, top_k_index, top_k_weights)
    return (outputs * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(OBSERVED_EXPERTS, observed_experts_forward)


@contextmanager
def observe(model: MtpCausalLM, family: Family, config: Config, statistics: Statistics) -> Iterator[None]:
    """While open, every forward pass of `model` adds to `statistics`. Rows must be free of padding."""
    usual = model.backbone.config._experts_implementation
    with ExitStack() as hooks:
        _observe_norms(hooks, model, family, config, statistics)
        _observe_layers(hooks, model, statistics)
        _observe_experts(hooks, model, family, config, statistics)
        model.set_experts_implementation(OBSERVED_EXPERTS)
        try:
            yield
        finally:
            model.set_experts_implementation(usual)


def _observe_norms(
    hooks: ExitStack, model: MtpCausalLM, family: Family, config: Config, statistics: Statistics
) -> None:
    """Every norm over the residual stream."""
    for _, tensor in family.residual_norms(config):

        def record(_module: nn.Module, _inputs: Any, output: torch.Tensor, tensor: str = tensor) -> None:
            statistics.add(f"norm/{tensor}/abs_sums", output.float().abs().sum(dim=(0, 1)))

        hooks.callback(module_of(model, tensor).register_forward_hook(record).remove)


def _observe_layers(hooks: ExitStack, model: MtpCausalLM, statistics: Statistics) -> None:
    """Hidden states before and after each decoder layer of the backbone."""
    layers = model.backbone.get_decoder().layers
    pending: dict[str, list[torch.Tensor]] = {"hidden": [], "cosine": []}

    def record(layer: int, inputs: torch.Tensor, output: torch.Tensor) -> None:
        before, after = inputs.float(), output.float()
        if layer == 0:
            pending["hidden"], pending["cosine"] = [before.sum(dim=(0, 1))], []
        pending["hidden"].append(after.sum(dim=(0, 1)))
        pending["cosine"].append(torch.cosine_similarity(before, after, dim=-1).sum())
        if layer == len(layers) - 1:
            statistics.add("layers/hidden_sums", torch.stack(pending["hidden"]))
            statistics.add("layers/cosine_sums", torch.stack(pending["cosine"]))

    for i, layer in enumerate(layers):
        hook = layer.register_forward_hook(lambda _module, inputs, output, i=i: record(i, inputs[0], output))
        hooks.callback(hook.remove)


def _observe_experts(
    hooks: ExitStack, model: MtpCausalLM, family: Family, config: Config, statistics: Statistics
) -> None:
    """Router logits, assignments, gates and the outputs of the chosen experts, per block."""
    for block in family.moe_blocks(config):
        prefix = f"experts/{block.name}/"

        def record_logits(_module: nn.Module, _inputs: Any, output: Any, prefix: str = prefix) -> None:
            logits = Routing(*output).logits.float()
            statistics.add(prefix + "logit_gram", logits.T @ logits)

        def record_outputs(
            outputs: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor, prefix: str = prefix
        ) -> None:
            num_experts = family.sizes(config)[family.expert]
            flat = experts.flatten()
            outputs = outputs.flatten(0, 1).float()  # [tokens * k, hidden]
            gates = gates.float() / gates.float().sum(dim=-1, keepdim=True)
            norms = outputs.norm(dim=-1)

            def per_expert(values: torch.Tensor) -> torch.Tensor:
                return values.new_zeros(num_experts, *values.shape[1:]).index_add_(0, flat, values)

            statistics.add(prefix + "assignments", per_expert(torch.ones_like(norms)))
            statistics.add(prefix + "gate_sums", per_expert(gates.flatten()))
            statistics.add(prefix + "gated_norm_sums", per_expert(gates.flatten() * norms))
            statistics.add(prefix + "output_sums", per_expert(outputs))

        router = module_of(model, block.prefix + family.router)
        hooks.callback(router.register_forward_hook(record_logits).remove)
        assert block.experts is not None
        experts_module = module_of(model, block.prefix + next(iter(block.experts.fused)))
        experts_module.slimqwen_observer = record_outputs
        hooks.callback(delattr, experts_module, "slimqwen_observer")
