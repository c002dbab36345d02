"""What a layer's networks answer, from where weights lie on disk, and silence that tells what they are asked."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from slimqwen.calibration.experts import OBSERVED_EXPERTS, ExpertsObserver
from slimqwen.calibration.stopwatch import Stopwatch
from slimqwen.repair.questions import Questions, answering

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
            stack.enter_context(_computed_by(ASKED_EXPERTS, experts))
        stack.callback(mlp.register_forward_hook(listen).remove)
        yield


@contextmanager
def experts_on_disk(experts: Any) -> Iterator[None]:
    """While open, this experts module answers, reading one expert at a time where its weights lie on disk."""
    experts.slimqwen_observer = ExpertsObserver(add=_discard, watch=Stopwatch())
    try:
        with _computed_by(OBSERVED_EXPERTS, experts):
            yield
    finally:
        del experts.slimqwen_observer


@contextmanager
def _computed_by(function: str, experts: Any) -> Iterator[None]:
    usual = experts.config._experts_implementation
    experts.config._experts_implementation = function
    try:
        yield
    finally:
        experts.config._experts_implementation = usual


def _one(hidden_states: Tensor, channel: int) -> Tensor:
    answer = torch.zeros_like(hidden_states)
    answer[..., channel] = 1
    return answer


def _discard(_name: str, _value: Tensor) -> None:
    """Nobody asks for the sums."""
