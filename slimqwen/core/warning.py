"""Warnings: problems that do not stop the work. Printed on stderr, and passed to a handler that may record them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from slimqwen.core.progress import say

_handler: ContextVar[Callable[[str], None]] = ContextVar("_handler", default=lambda text: None)
_printed: set[str] = set()


def warn(text: str) -> None:
    """Print a warning on stderr, and pass it to the handler of the innermost `handle_warnings`."""
    say(text)
    _handler.get()(text)


def warn_once(text: str) -> None:
    """Like `warn`, but print a repeated text once per process. The handler still receives each repetition."""
    if text in _printed:
        _handler.get()(text)
    else:
        _printed.add(text)
        warn(text)


@contextmanager
def handle_warnings(handler: Callable[[str], None]) -> Iterator[None]:
    """Call `handler` with every warning raised within this block."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)
