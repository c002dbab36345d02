"""A layer run without its networks, whose inputs and gates are recorded."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from slimqwen.families.family import TensorSpec
from slimqwen.layerwise.side_by_side import LayerProgress
from slimqwen.layerwise.step import Step
from slimqwen.layerwise.stream import Stream, moe_block
from slimqwen.model.internals import computed_by
from slimqwen.model.patching import overridden
from slimqwen.refit.inputs import RecordedInputs
from slimqwen.refit.matrices import Network

RECORDED_EXPERTS = "slimqwen_recorded"


def recorded_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return zeros, and record the chosen experts in `self.slimqwen_inputs`."""
    recorded: Any = self.slimqwen_inputs
    recorded.add_choice(top_k_index, top_k_weights)
    return torch.zeros_like(hidden_states)


ALL_EXPERTS_FUNCTIONS.register(RECORDED_EXPERTS, recorded_experts_forward)


@contextmanager
def networks_recorded(
    mlp: nn.Module, networks: Sequence[nn.Module], experts: Any | None, recorded: RecordedInputs
) -> Iterator[None]:
    """Let the module `mlp` add nothing to the residual stream while it is open, and record its inputs and gates.

    networks: its dense ones; `mlp` itself where it is one. A network's gate is what `mlp` makes of an output of 1: each
    network returns 1 in a channel of its own, and the experts return 0.
    """

    def record(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        recorded.add(inputs[0], output[..., : len(networks)])
        return torch.zeros_like(output)

    with ExitStack() as stack:
        for channel, network in enumerate(networks):
            stack.enter_context(overridden(network, forward=partial(_one_hot, channel=channel)))
        if experts is not None:
            stack.enter_context(overridden(experts, slimqwen_inputs=recorded))
            stack.enter_context(computed_by(RECORDED_EXPERTS, experts))
        stack.callback(mlp.register_forward_hook(record).remove)
        yield


def record_networks(
    stream: Stream, step: Step, outputs: Sequence[TensorSpec], hidden: Tensor, inputs: Path, progress: LayerProgress
) -> list[Network]:
    """Take the text through a layer without its networks, in place; return these, in the order of their output matrices.

    Their inputs are written to the file `inputs`. They read the step's weights, which must be there.
    """
    dense = [spec.name for spec in outputs if spec.part != "routed_experts"]
    networks = [stream.model.module_of(name.removesuffix(".weight")) for name in dense]
    block = moe_block(step)
    experts = None if block is None else stream.experts_of(block)
    recorded = RecordedInputs(stream.create(inputs).flatten(0, 1), stream.device)
    with networks_recorded(networks[0] if step.moe is None else step.moe, networks, experts, recorded):
        for rows in stream.passes():
            hidden[rows] = step.run(stream.prepare(hidden[rows]), stream.tokens[rows]).cpu().float()
            progress.advance(hidden[rows, :, 0].numel())
    result = [
        recorded.to_dense(number, network, stream.model.module_of(name))
        for number, (network, name) in enumerate(zip(networks, dense, strict=True))
    ]
    return result if experts is None else result + recorded.to_experts(experts)


def _one_hot(hidden_states: Tensor, channel: int) -> Tensor:
    output = torch.zeros_like(hidden_states)
    output[..., channel] = 1
    return output
