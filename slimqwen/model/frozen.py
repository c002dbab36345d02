"""Weights that are not trained: held in the dtype that they have on disk, computed with as if they were float32.

What they save is memory: 2 bytes instead of 16 per parameter where the checkpoint is in bfloat16. Autograd keeps no activation for
the gradient of a weight that has none. A product is computed in the dtype of its input: the weight is cast for it, in the
forward pass and again in the backward pass, and nothing of the cast weight is kept in between. Under autocast, and where weights are
gathered in bfloat16, it is used as it is.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.model.experts import Pairs
from slimqwen.model.internals import apply_gate
from slimqwen.model.patching import override


class _Product(torch.autograd.Function):
    """x W^T, W cast to the dtype of x; it has a gradient in x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None


def frozen_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T, [..., columns] by [rows, columns] to [..., rows], in the dtype of x; only x gets a gradient."""
    product: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return product


def frozen_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute routed experts that are held in another dtype, one after another: at most one of them is cast at a time.

    Shapes: hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k]; returns [tokens, hidden].
    """
    pairs = Pairs.of(top_k_index, top_k_weights.detach(), experts.num_experts)
    inputs = hidden_states[pairs.tokens]
    outputs = []
    for expert, rows in pairs.by_expert():
        neurons = apply_gate(experts, frozen_product(inputs[rows], experts.gate_up_proj[expert]))
        outputs.append(frozen_product(neurons, experts.down_proj[expert]))
    by_expert = torch.cat(outputs)
    per_choice = torch.empty_like(by_expert)
    per_choice[pairs.order] = by_expert
    weighted = per_choice.view(*top_k_index.shape, -1) * top_k_weights[..., None]
    return weighted.sum(dim=1).to(hidden_states.dtype)


def freeze_as_stored(
    model: nn.Module, tensors: Mapping[str, Tensor], stored: Mapping[str, torch.dtype], dtype: torch.dtype
) -> None:
    """Freeze parameters of a model on the meta device, before memory is allocated; its large matrices get their stored dtype.

    These are the matrices of linear layers, embedding, lm_head and routed experts. Vectors, and the few small matrices that a
    module computes with in its own way (routers, convolutions), stay in the dtype that they have.

    Args:
        tensors: what is frozen, by name.
        stored: the dtype of each on disk (`stored_dtypes`).
        dtype: of what embeddings give out.
    """
    frozen = {id(tensor): stored[name] for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.requires_grad_(False)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            found = frozen.get(id(parameter))
            if found is not None and found != dtype and name in _matrices_computed_here(module):
                parameter.data = parameter.data.to(found)
                if isinstance(module, nn.Linear):
                    override(module, forward=partial(_linear, module))
                elif isinstance(module, nn.Embedding):
                    override(module, forward=partial(_look_up, module, dtype))


def stored_dtypes(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """Return the dtype on disk of each tensor, by its name in the model; of experts in several, one that holds them all."""
    family, config = checkpoint.family, checkpoint.config
    dtypes: dict[str, torch.dtype] = {}
    for spec in checkpoint.specs.values():
        name, dtype = spec.name, checkpoint.dtype(spec.name)
        if spec.expert is not None and spec.block.experts is not None:
            name = spec.block.prefix + spec.block.experts.holder(spec.pattern)
        own = family.module_name(name, config)
        dtypes[own] = torch.promote_types(dtypes.get(own, dtype), dtype)
    return dtypes


def _matrices_computed_here(module: nn.Module) -> Collection[str]:
    """Return a module's parameters that this file computes with."""
    if type(module).forward in (nn.Linear.forward, nn.Embedding.forward):
        return ("weight",)
    return ("gate_up_proj", "down_proj") if hasattr(module, "gate_up_proj") else ()


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """Compute a linear layer whose weight is frozen."""
    if x.dtype == module.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, module.weight, module.bias)
    product = frozen_product(x, module.weight)
    return product if module.bias is None else product + module.bias.to(x.dtype)


def _look_up(module: nn.Embedding, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    """Look tokens up in a frozen table."""
    return F.embedding(tokens, module.weight, module.padding_idx).to(dtype)
