"""Routed experts computed by another function for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def computed_by(function: str, experts: Any) -> Iterator[None]:
    """Let this experts module compute by `function`, a key of Transformers' ALL_EXPERTS_FUNCTIONS, while it is open."""
    usual = experts.config._experts_implementation
    experts.config._experts_implementation = function
    try:
        yield
    finally:
        experts.config._experts_implementation = usual
