"""Progress of a stage on stderr: one live line on a terminal, plain lines elsewhere (a log file, CI, a pipe).

On a terminal too narrow for it the live line wraps: no field is lost.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.terminal import visible

PLAIN_LINE_EVERY_SECONDS = 10.0
REDRAW_EVERY_SECONDS = 0.25
RATE_WINDOW_SECONDS = 20.0  # long enough to smooth steps, short enough that the time left follows a change of speed


_is_quiet = False  # of the whole process: its threads print nothing either


@contextmanager
def quiet(is_quiet: bool) -> Iterator[None]:
    """Print nothing within this context, in a process that works beside another that prints the same; where it is so."""
    global _is_quiet
    before, _is_quiet = _is_quiet, is_quiet
    try:
        yield
    finally:
        _is_quiet = before


def say(*lines: str) -> None:
    """Print lines to stderr, above the live line if there is one. Control characters are escaped (`visible`)."""
    if _is_quiet:
        return
    for line in map(visible, lines):
        if _on_terminal():
            _console().print(Text(line), soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


class Progress:
    """A progress display: what is done, at which rate, and the estimated time left.

        with Progress("distil stage 2/2 slimqwen", total=540_000, unit="tokens") as progress:
            progress.advance(2048, loss=3.21, kl=0.41)

    Args:
        title: of the work.
        total: the amount of work, in `unit`; None if that is unknown.
        unit: what is counted, in the plural: "tokens", "tensors". "bytes" are shown in a larger unit: "12.3/160.0 GB".
        start: the amount that an earlier, interrupted process completed. It counts for the bar, not for the rate.
        clock: seconds since any fixed moment.
    """

    def __init__(
        self,
        title: str,
        *,
        total: int | None,
        unit: str,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = visible(title)
        self._total = total
        self._unit = unit
        self._start = start
        self._clock = clock
        self._done = start
        self._fields: dict[str, float | str] = {}
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        self._started_at = self._shown_at = self._clock()
        self._window = deque([(self._started_at, self._done)])
        if _on_terminal():
            self._bar = _live_bar()
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._done, status=self._status())
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._show(self._final_status())
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int, **fields: float | str) -> None:
        """Add `amount` completed units. `fields` are shown until the next call replaces them."""
        now = self._clock()
        self._done += amount
        self._fields |= fields
        self._window.append((now, self._done))
        # One sample older than the window stays, so that a step longer than the window has a rate too.
        while len(self._window) > 2 and self._window[1][0] <= now - RATE_WINDOW_SECONDS:
            self._window.popleft()
        if now - self._shown_at >= (REDRAW_EVERY_SECONDS if self._bar else PLAIN_LINE_EVERY_SECONDS):
            self._shown_at = now
            self._show(self._status())

    def go_back(self, amount: int) -> None:
        """Take back `amount` completed units, which are done again."""
        self._done -= amount
        self._start -= amount  # they count for the rate
        self._window = deque([(self._clock(), self._done)])

    def _show(self, status: str) -> None:
        if self._bar is None:
            say(f"{self._title}: {status}")
        else:
            self._bar.update(self._task, completed=self._done, status=status, refresh=True)

    def _status(self) -> str:
        (first_at, first_done), (last_at, last_done) = self._window[0], self._window[-1]
        rate = _rate(last_done - first_done, last_at - first_at)
        left = f"{duration((self._total - self._done) / rate)} left" if self._total is not None and rate else ""
        return self._join(rate, left)

    def _final_status(self) -> str:
        seconds = self._clock() - self._started_at
        return self._join(_rate(self._done - self._start, seconds), f"took {duration(seconds)}")

    def _join(self, rate: float, time_words: str) -> str:
        speed = f"{self._amount(rate)}/s" if rate else ""
        fields = [visible(f"{name} {_in_words(value)}") for name, value in self._fields.items()]
        return ", ".join(filter(None, [self._done_of_total(), speed, time_words, *fields]))

    def _done_of_total(self) -> str:
        if self._total is None:
            return self._amount(self._done)
        if self._unit == "bytes":
            return bytes_in_words(self._done, self._total)
        return f"{self._done:,}/{self._total:,} {self._unit}"

    def _amount(self, number: float) -> str:
        return bytes_in_words(number) if self._unit == "bytes" else f"{_in_words(number)} {self._unit}"


def duration(seconds: float) -> str:
    """Format a duration: `45 s`, `2 min 23 s`, `5 h 07 min`, `3 d 04 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def _rate(amount: int, seconds: float) -> float:
    """Return units per second; 0.0 before any time has passed."""
    return amount / seconds if seconds > 0 else 0.0


def _in_words(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2e}"


def _on_terminal() -> bool:
    # Not rich's own test: with FORCE_COLOR that one takes a log file for a terminal.
    return not _is_quiet and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@cache
def _console() -> Console:
    """Return the console that live lines and `say` share, so that neither overwrites the other."""
    return Console(stderr=True)


def _live_bar() -> Bar:
    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[status]}", markup=False, table_column=Column(ratio=1)),
        console=_console(),
        auto_refresh=False,  # `advance` redraws: no thread beside the work
        redirect_stdout=sys.stdout.isatty(),  # results piped elsewhere must get there, not to the terminal
        expand=True,
    )
