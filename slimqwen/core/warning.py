"""What a person should know although the work goes on: printed on stderr, and passed to whoever keeps it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from slimqwen.core.progress import say

_keep: ContextVar[Callable[[str], None]] = ContextVar("_keep", default=lambda text: None)
_said: set[str] = set()


def warn(text: str) -> None:
    """Print a line on stderr, and pass it to the innermost `passed_to`."""
    say(text)
    _keep.get()(text)


def warn_once(text: str) -> None:
    """`warn` of what comes up again and again: printed once by a process, and passed on wherever it comes up."""
    if text in _said:
        _keep.get()(text)
    else:
        _said.add(text)
        warn(text)


@contextmanager
def passed_to(keep: Callable[[str], None]) -> Iterator[None]:
    """Call `keep` with every warning of this block."""
    token = _keep.set(keep)
    try:
        yield
    finally:
        _keep.reset(token)
