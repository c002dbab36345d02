"""Ctrl-C and SIGTERM, deferred to the end of the current micro-batch."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from slimqwen.core.progress import say
from slimqwen.parallel.ranks import ALONE, Ranks

T = TypeVar("T")


class StepInterrupted(Exception):
    """A signal that ends an optimiser step between two of its micro-batches. The model is as it was before the step."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class Interrupts:
    """Signals that end an optimiser step between two of its micro-batches, on all ranks at the same one.

    received: returns the signal that this process got, 0 for none.

    Each rank's signal is sent when a micro-batch begins and read when the next one begins: the exchange, of one number by way of
    the CPU, takes place during the work of the micro-batch, and no rank waits for another or for its GPU because of it. So a
    signal takes effect after the micro-batch under way or, with several ranks, at most one more.
    """

    def __init__(self, ranks: Ranks = ALONE, received: Callable[[], int] = lambda: 0) -> None:
        self._ranks = ranks
        self._received = received

    def end_alone(self) -> None:
        """Raise StepInterrupted where this process trains alone and got a signal: within work before the micro-batches."""
        if self._ranks.size == 1 and (received := self._received()):
            raise StepInterrupted(received)

    def between(self, micro_batches: Sequence[T]) -> Iterator[T]:
        """Yield the micro-batches; between two of them raise StepInterrupted where a rank got a signal.

        A single micro-batch is not interrupted, and costs no exchange. All ranks must have the same number of them.
        """
        sent: Callable[[], int] | None = None
        for number, micro_batch in enumerate(micro_batches, start=1):
            if sent is not None and (received := sent()):
                raise StepInterrupted(received)
            if self._ranks.size == 1:
                sent = self._received
            elif number < len(micro_batches):  # an exchange without a reader would be left over
                sent = self._ranks.begin_largest(self._received())
            yield micro_batch


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
            say(f"interrupted: finishing this micro-batch and saving{again}")
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
