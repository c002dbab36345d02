"""Watching the routers: one forward hook per MoE block, for the load-balancing loss, utilisation and calibration."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from slimqwen.families.family import Block
from slimqwen.model.model import MtpCausalLM


@dataclass(frozen=True)
class Routing:
    """A router's outputs in one forward pass.

    logits: [tokens, experts] before softmax; gates: [tokens, k], the weights its experts' outputs are summed with;
    experts: [tokens, k] int64, the chosen experts.
    """

    logits: torch.Tensor
    gates: torch.Tensor
    experts: torch.Tensor


@contextmanager
def observe_routing(model: MtpCausalLM, blocks: list[Block]) -> Iterator[dict[str, Routing]]:
    """Record the routing of each forward pass in the yielded dict, by block name, while open. Gradients are kept.

    With activation checkpointing the backward pass runs the block again and would overwrite the entry: read it
    between forward and backward.
    """
    seen: dict[str, Routing] = {}

    def recorder(name: str):  # type: ignore[no-untyped-def]
        def record(_module, _inputs, output) -> None:  # type: ignore[no-untyped-def]
            seen[name] = Routing(*output)

        return record

    routers = [(block.name, model.module_of(block.prefix + model.family.router)) for block in blocks]
    hooks = [router.register_forward_hook(recorder(name)) for name, router in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
