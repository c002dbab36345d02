"""A layer whose networks are silent, which tells what they are asked."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from slimqwen.families.family import TensorSpec
from slimqwen.layerwise.experts import computed_by
from slimqwen.layerwise.side_by_side import LayerProgress
from slimqwen.layerwise.step import Step
from slimqwen.layerwise.stream import Stream, moe_block
from slimqwen.refit.matrices import Network
from slimqwen.refit.questions import Questions, answering

ASKED_EXPERTS = "slimqwen_asked"


def asked_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Zeros; and `self.slimqwen_questions` is told the choice."""
    questions: Any = self.slimqwen_questions
    questions.add_choice(top_k_index, top_k_weights)
    return torch.zeros_like(hidden_states)


ALL_EXPERTS_FUNCTIONS.register(ASKED_EXPERTS, asked_experts_forward)


@contextmanager
def silent(mlp: nn.Module, networks: Sequence[nn.Module], experts: Any | None, questions: Questions) -> Iterator[None]:
    """While open, the module `mlp` adds nothing to the residual stream, and `questions` is told what it is asked.

    networks: its dense ones; `mlp` itself where it is one. Whatever weighs a network's answer is found by what `mlp`
    makes of a 1: each answers 1 in a channel of its own, and the experts 0.
    """

    def listen(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        questions.add(inputs[0], output[..., : len(networks)])
        return torch.zeros_like(output)

    with ExitStack() as stack:
        for channel, network in enumerate(networks):
            stack.enter_context(answering(network, partial(_one, channel=channel)))
        if experts is not None:
            experts.slimqwen_questions = questions
            stack.callback(delattr, experts, "slimqwen_questions")
            stack.enter_context(computed_by(ASKED_EXPERTS, experts))
        stack.callback(mlp.register_forward_hook(listen).remove)
        yield


def ask(
    stream: Stream, step: Step, outputs: Sequence[TensorSpec], hidden: Tensor, asked: Path, progress: LayerProgress
) -> list[Network]:
    """Through a layer whose networks say nothing, in place; returns these, in the order of their output matrices.

    What they are asked is kept in the file `asked`. They read the step's weights, which must be there.
    """
    dense = [spec.name for spec in outputs if spec.part != "routed_experts"]
    networks = [stream.model.module_of(name.removesuffix(".weight")) for name in dense]
    block = moe_block(step)
    experts = None if block is None else stream.experts_of(block)
    questions = Questions(stream.create(asked).flatten(0, 1))
    with silent(networks[0] if step.moe is None else step.moe, networks, experts, questions):
        for rows in stream.passes():
            hidden[rows] = step.run(stream.prepare(hidden[rows]), stream.tokens[rows]).cpu().float()
            progress.advance(hidden[rows, :, 0].numel())
    result = [
        questions.to_dense(number, network, stream.model.module_of(name))
        for number, (network, name) in enumerate(zip(networks, dense, strict=True))
    ]
    return result if experts is None else result + questions.to_experts(experts)


def _one(hidden_states: Tensor, channel: int) -> Tensor:
    answer = torch.zeros_like(hidden_states)
    answer[..., channel] = 1
    return answer
