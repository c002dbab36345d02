"""Hooks that gather statistics while Transformers' own forward pass runs: everything in one pass, from the axis table."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimqwen.calibration.statistics import Statistics
from slimqwen.core.stopwatch import Stopwatch
from slimqwen.families.axes import Axis
from slimqwen.families.family import Block
from slimqwen.model.experts import OBSERVED_EXPERTS, ExpertsObserver
from slimqwen.model.internals import computed_by
from slimqwen.model.model import MtpCausalLM
from slimqwen.model.patching import overridden
from slimqwen.model.routing import Routing


@contextmanager
def observe(model: MtpCausalLM, statistics: Statistics, second_moments: bool = False) -> Iterator[Stopwatch]:
    """Let every forward pass of `model` add to the open part of `statistics` while it is open. Rows must be free of padding.

    Yields a watch that counts the seconds this takes beside the model's own forward pass.
    """
    layers, watch = model.backbone.get_decoder().layers, Stopwatch()
    blocks = model.family.blocks(model.config)
    with observe_blocks(model, blocks, statistics, watch, second_moments), ExitStack() as hooks:
        for number, layer in enumerate(layers):

            def record(_module: nn.Module, inputs: Any, output: Tensor, number: int = number) -> None:
                with watch:
                    add_layer_sums(statistics, number, len(layers), inputs[0], output)

            hooks.callback(layer.register_forward_hook(record).remove)
        yield watch


@contextmanager
def observe_blocks(
    model: MtpCausalLM,
    blocks: Collection[Block],
    statistics: Statistics,
    watch: Stopwatch,
    second_moments: bool = False,
) -> Iterator[None]:
    """Add the sums over what is inside these blocks while it is open: norms, writers into the residual stream, experts."""
    family, config = model.family, model.config
    with ExitStack() as hooks:
        for block, tensor in family.residual_norms(config):
            if block in blocks:
                hooks.callback(_observe_norm(model, tensor, statistics, watch).remove)
                if second_moments:
                    hooks.callback(_observe_moments(model, tensor, statistics, watch).remove)
        for block, tensor, axes in family.writers(config):
            if block in blocks:
                hooks.callback(_observe_writer(model, tensor, axes, statistics, watch).remove)
        for block in family.moe_blocks(config):
            if block in blocks:
                hooks.enter_context(_observed_experts(model, block, statistics, watch))
        yield


def add_layer_sums(statistics: Statistics, number: int, layers: int, before: Tensor, after: Tensor) -> None:
    """Add the sums over the hidden states [batch, seq, hidden] before and after decoder layer `number` of `layers`."""
    before, after = before.float(), after.float()
    hidden = before.new_zeros(layers + 1, before.shape[-1])
    hidden[number + 1] = after.sum(dim=(0, 1))
    if number == 0:
        hidden[0] = before.sum(dim=(0, 1))
    cosine = before.new_zeros(layers)
    cosine[number] = torch.cosine_similarity(before, after, dim=-1).sum()
    statistics.add("layers/hidden_sums", hidden)
    statistics.add("layers/cosine_sums", cosine)


def _observe_norm(model: MtpCausalLM, tensor: str, statistics: Statistics, watch: Stopwatch) -> RemovableHandle:
    """Add up the output of a norm over the residual stream, per channel."""

    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        with watch:
            statistics.add(f"norm/{tensor}/abs_sums", output.float().abs().sum(dim=(0, 1)))

    return model.module_of(tensor).register_forward_hook(record)


def _observe_moments(model: MtpCausalLM, tensor: str, statistics: Statistics, watch: Stopwatch) -> RemovableHandle:
    """Add up the products of a norm's normalised inputs, before its gain, per pair of channels."""
    eps = model.backbone.get_decoder().config.rms_norm_eps

    def record(_module: nn.Module, inputs: Any) -> None:
        with watch:
            hidden = inputs[0].flatten(0, -2).float()
            normalised = hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + eps)
            statistics.add(f"norm/{tensor}/second_moments", normalised.T @ normalised)

    return model.module_of(tensor).register_forward_pre_hook(record)


def _observe_writer(
    model: MtpCausalLM, tensor: str, axes: tuple[Axis, ...], statistics: Statistics, watch: Stopwatch
) -> RemovableHandle:
    """Add up the inputs of a projection into the residual stream, [..., columns], by neuron or by head, over `axes`."""
    sizes = model.family.sizes(model.config)

    def record(_module: nn.Module, inputs: Any) -> None:
        with watch:
            units = inputs[0].flatten(0, -2).float().unflatten(-1, [sizes[axis] for axis in axes])
            if len(axes) == 1:
                statistics.add(f"input/{tensor}/abs_sums", units.abs().sum(dim=0))
            else:
                statistics.add(f"input/{tensor}/norm_sums", units.norm(dim=-1).sum(dim=0))

    return model.module_of(tensor).register_forward_pre_hook(record)


@contextmanager
def _observed_experts(model: MtpCausalLM, block: Block, statistics: Statistics, watch: Stopwatch) -> Iterator[None]:
    """Add up the router's logits, and the experts' sums (`observed_experts_forward`), while it is open."""
    assert block.experts is not None
    router = model.module_of(block.prefix + model.family.router)
    experts: Any = model.module_of(block.prefix + next(iter(block.experts.fused)))

    def add(name: str, value: Tensor) -> None:
        statistics.add(f"experts/{block.name}/{name}", value)

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        with watch:
            logits = Routing(*output).logits.float()
            add("logit_gram", logits.T @ logits)

    observer = ExpertsObserver(add, watch)
    with ExitStack() as stack:
        stack.callback(router.register_forward_hook(record).remove)
        stack.enter_context(overridden(experts, slimqwen_observer=observer))
        stack.enter_context(computed_by(OBSERVED_EXPERTS, experts))
        yield
