"""Watching the routers: one forward hook per MoE block, for the load-balancing loss, utilisation and calibration."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from slimqwen.families import Family
from slimqwen.families.family import Block
from slimqwen.modeling.model import MtpCausalLM
from slimqwen.modeling.mtp import MTP_PREFIX


@dataclass(frozen=True)
class Routing:
    """What a router said in one forward pass.

    logits: [tokens, experts] before softmax; gates: [tokens, k], the weights its experts' outputs are summed with;
    experts: [tokens, k] int64, the chosen experts.
    """

    logits: torch.Tensor
    gates: torch.Tensor
    experts: torch.Tensor


def module_of(model: MtpCausalLM, tensor_name: str) -> torch.nn.Module:
    """The module that owns a checkpoint tensor: 'model.norm.weight' -> backbone.model.norm."""
    path = tensor_name.rpartition(".")[0]
    return model.get_submodule(path if path.startswith(MTP_PREFIX) else f"backbone.{path}")


@contextmanager
def observe_routing(model: MtpCausalLM, family: Family, blocks: list[Block]) -> Iterator[dict[str, Routing]]:
    """While open, each forward pass leaves its routing in the yielded dict, by block name. Gradients are kept.

    With activation checkpointing the backward pass runs the block again and would overwrite the entry: read it
    between forward and backward.
    """
    seen: dict[str, Routing] = {}

    def recorder(name: str):  # type: ignore[no-untyped-def]
        def record(_module, _inputs, output) -> None:  # type: ignore[no-untyped-def]
            seen[name] = Routing(*output)

        return record

    hooks = [
        module_of(model, block.prefix + family.router).register_forward_hook(recorder(block.name)) for block in blocks
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
