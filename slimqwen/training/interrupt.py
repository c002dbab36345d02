"""Ctrl-C and SIGTERM answered at a moment of our choosing: between two optimiser steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slimqwen.core.progress import say
from slimqwen.parallel.ranks import Ranks


@contextmanager
def deferred_interrupts(ranks: Ranks) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the signal that has come, SIGINT or SIGTERM, and 0 before.

    A second Ctrl-C interrupts at once, as usual; but not one of many ranks, which a terminal and torchrun both signal.
    """
    if threading.current_thread() is not threading.main_thread():  # signals can only be handled there
        yield lambda: 0
        return
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received and ranks.size == 1:
            raise KeyboardInterrupt
        if not received and ranks.is_first:
            again = " (Ctrl-C again stops at once, without saving)" if ranks.size == 1 else ""
            say(f"interrupted: finishing this step and saving{again}")
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
