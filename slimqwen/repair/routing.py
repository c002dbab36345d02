"""Experts functions for repair: the experts' own answers where weights lie on disk, and silence that tells the question."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from slimqwen.calibration.experts import OBSERVED_EXPERTS, ExpertsObserver
from slimqwen.calibration.stopwatch import Stopwatch

ASKED_EXPERTS = "slimqwen_asked"

Listener = Callable[[Tensor, Tensor, Tensor], None]
"""Told hidden_states [tokens, hidden], the chosen experts and their gates, both [tokens, k]."""


def asked_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Zeros; and `self.slimqwen_listener` is told the question."""
    listener: Any = self.slimqwen_listener
    listener(hidden_states, top_k_index, top_k_weights)
    return torch.zeros_like(hidden_states)


ALL_EXPERTS_FUNCTIONS.register(ASKED_EXPERTS, asked_experts_forward)


@contextmanager
def silent_experts(experts: Any, listener: Listener) -> Iterator[None]:
    """While open, this experts module adds nothing to the residual stream, and `listener` is told what it is asked."""
    experts.slimqwen_listener = listener
    try:
        with _computed_by(ASKED_EXPERTS, experts):
            yield
    finally:
        del experts.slimqwen_listener


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


def _discard(_name: str, _value: Tensor) -> None:
    """Nobody asks for the sums."""
