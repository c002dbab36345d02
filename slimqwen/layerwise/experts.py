"""Routed experts computed by another function for a while: one that reads each from where it lies on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from slimqwen.core.stopwatch import Stopwatch
from slimqwen.model.experts import OBSERVED_EXPERTS, ExpertsObserver


@contextmanager
def computed_by(function: str, experts: Any) -> Iterator[None]:
    """While open, this experts module computes by `function`, a key of Transformers' ALL_EXPERTS_FUNCTIONS."""
    usual = experts.config._experts_implementation
    experts.config._experts_implementation = function
    try:
        yield
    finally:
        experts.config._experts_implementation = usual


@contextmanager
def experts_on_disk(experts: Any) -> Iterator[None]:
    """While open, this experts module answers, reading one expert at a time where its weights lie on disk."""
    experts.slimqwen_observer = ExpertsObserver(add=_discard, watch=Stopwatch())
    try:
        with computed_by(OBSERVED_EXPERTS, experts):
            yield
    finally:
        del experts.slimqwen_observer


def _discard(_name: str, _value: Tensor) -> None:
    """Discard the sums."""
