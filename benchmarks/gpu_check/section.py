"""What every section of the GPU check shares: its options, and a line of JSON for each part as it ends."""

import argparse
import faulthandler
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SKIPPED = 77  # exit code of a section without a part that ran
SECONDS_TO_TELL = 3.0  # before its limit, where a section that hangs is printed


class Skip(Exception):
    """Reason why a part cannot be run here."""


class Part:
    """Part of a section: numbers, and the checks that failed."""

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {}
        self.failures: list[str] = []

    def note(self, **numbers: Any) -> None:
        """Keep numbers or words as results."""
        for name, value in numbers.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            self.numbers[name] = value if finite else str(value)

    def check_below(self, name: str, value: float, limit: float) -> None:
        """Keep a number, which must not exceed `limit`; NaN does."""
        self.note(**{name: value})
        if not value <= limit:
            self.failures.append(f"{name} is {value:.3g}, above {limit:g}")

    def check(self, name: str, is_true: bool) -> None:
        """Keep the answer to a question, which must be yes."""
        self.note(**{name: is_true})
        if not is_true:
            self.failures.append(f"not {name}")


class Section:
    """One section: its options (`device`, `quick`), and how its parts ended.

    A context manager, whose exit ends the process: with 1 where a part failed, 77 where none ran.
    """

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        parser.add_argument("--name", default=Path(sys.argv[0]).stem, help="By which its results are kept.")
        parser.add_argument("--quick", action="store_true", help="Tiny shapes.")
        parser.add_argument("--cap", type=float, help="Seconds after which the process is killed.")
        options = parser.parse_args()
        self.device: str = options.device
        self.quick: bool = options.quick
        self.on_gpu = self.device == "cuda"
        self.name: str = options.name
        self.statuses: list[str] = []
        if options.cap is not None and options.cap > SECONDS_TO_TELL:
            faulthandler.dump_traceback_later(options.cap - SECONDS_TO_TELL)

    @contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """Run a part; whatever it raises is its result, and the next part begins."""
        part, started = Part(), time.perf_counter()
        line: dict[str, Any] = {"section": self.name, "part": name}
        try:
            yield part
            status = "failed" if part.failures else "passed"
        except Skip as skip:
            status = "skipped"
            line["reason"] = str(skip)
        except Exception as error:
            status = "failed"
            line["reason"] = f"{type(error).__name__}: {error}"[:600]
            line["traceback"] = traceback.format_exc()[-2000:]
            traceback.print_exc()
        line |= {"status": status, "seconds": round(time.perf_counter() - started, 3), "numbers": part.numbers}
        if part.failures:
            line["failures"] = part.failures
        self.statuses.append(status)
        append(line)

    def __enter__(self) -> "Section":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            return
        if "failed" in self.statuses:
            sys.exit(1)
        if set(self.statuses) <= {"skipped"}:
            sys.exit(SKIPPED)


def append(line: dict[str, Any]) -> None:
    """Append a line of JSON to the results, in one write, and print it."""
    text = json.dumps(line)
    print(text, flush=True)
    if "GPU_CHECK_OUT" in os.environ:
        with Path(os.environ["GPU_CHECK_OUT"]).open("ab", buffering=0) as file:
            file.write(text.encode() + b"\n")


def wait(device: str) -> None:
    """Wait for the GPU's work."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def median_seconds(work: Callable[[], object], device: str, *, rounds: int, warmups: int = 2) -> float:
    """Return the median of the seconds that `work` takes, waited for."""
    for _ in range(warmups):
        work()
    wait(device)
    took = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        wait(device)
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def error_of(found: Any, expected: Any) -> float:
    """Return the norm of the difference over the norm of what is expected, in float64 on the CPU."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    size = float(expected.norm())
    return float((found - expected).norm()) / size if size else float(found.norm())
