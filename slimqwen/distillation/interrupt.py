"""Ctrl-C and SIGTERM answered at a moment of our choosing: between two optimiser steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slimqwen.progress import say


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether a signal has come. A second Ctrl-C interrupts at once, as usual."""
    if threading.current_thread() is not threading.main_thread():  # signals can only be handled there
        yield lambda: False
        return
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        say("interrupted: finishing this step and saving (Ctrl-C again stops at once, without saving)")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
