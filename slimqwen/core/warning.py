"""Warnings: problems that do not stop the work. Printed on stderr, and passed to a handler that may record them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from slimqwen.core.progress import say

_keep: ContextVar[Callable[[str], None]] = ContextVar("_keep", default=lambda text: None)
_said: set[str] = set()


def warn(text: str) -> None:
    """Print a warning on stderr, and pass it to the handler of the innermost `passed_to`."""
    say(text)
    _keep.get()(text)


def warn_once(text: str) -> None:
    """Like `warn`, but print a repeated text once per process. The handler still receives each repetition."""
    if text in _said:
        _keep.get()(text)
    else:
        _said.add(text)
        warn(text)


@contextmanager
def passed_to(keep: Callable[[str], None]) -> Iterator[None]:
    """Call `keep` with every warning raised within this block."""
    token = _keep.set(keep)
    try:
        yield
    finally:
        _keep.reset(token)
