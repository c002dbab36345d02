"""A stopwatch for work in pieces too small and too many to log one by one."""

import time
from types import TracebackType


class Stopwatch:
    """A sum of the `seconds` spent inside its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started_at = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._started_at
