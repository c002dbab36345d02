"""Ctrl-C and SIGTERM, deferred to the end of the current optimiser step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slimqwen.core.progress import say
from slimqwen.parallel.ranks import Ranks


@contextmanager
def defer_interrupts(ranks: Ranks) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the signal received so far, SIGINT or SIGTERM, or 0 for none.

    A second Ctrl-C interrupts at once, as usual; but not with several ranks, which get the signal from the terminal and from
    torchrun.
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
