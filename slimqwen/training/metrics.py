"""metrics.jsonl: one line per optimiser step of every training in a run directory; the same numbers go to the loggers."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from slimqwen.artifacts.json_lines import append, is_cut_short, keep_lines, value_of
from slimqwen.training.loggers import Logger

KEYS = ("run", "stage", "step")  # every line begins with them


@dataclass(frozen=True)
class StepLog:
    """Where the numbers of every step are appended, and how their lines are labelled.

    metrics: the metrics.jsonl; None: the one beside the result. run, stage: the labels.
    """

    metrics: Path | None = None
    run: str = "slimqwen"
    stage: int = 1


class MetricsLog:
    """Lines of one training (`run`, `stage`) in a shared file, appended as steps end.

    loggers: get the numbers of each step too, and are closed with this context.
    """

    def __init__(self, path: Path, run: str, stage: int, loggers: Sequence[Logger] = ()) -> None:
        self.path = path
        self.run = run
        self.stage = stage
        self.loggers = loggers
        path.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for logger in self.loggers:
            logger.close()

    def rewind(self, first_step: int) -> None:
        """Drop this training's lines from `first_step` on, which were written after the state that it resumes from.

        All other lines stay, of whatever kind, except one that a kill cut short.
        """
        last_step = first_step - 1

        def is_kept(line: bytes) -> bool:
            nonlocal last_step
            entry = _entry(line)
            if entry is None:
                return not is_cut_short(line, KEYS[0])
            if (entry["run"], entry["stage"]) != (self.run, self.stage) or entry["step"] < first_step:
                return True
            last_step = max(last_step, entry["step"])
            return False

        keep_lines(self.path, is_kept)
        for logger in self.loggers:
            logger.begin(first_step, last_step)

    def append(self, step: int, values: dict[str, Any]) -> None:
        """Append the line of a step, and log its numbers."""
        append(self.path, dict(zip(KEYS, (self.run, self.stage, step), strict=True)) | values)
        for logger in self.loggers:
            logger.log(step, {name: value for name, value in values.items() if isinstance(value, int | float)})


def forget_stages_after(path: Path, last_stage: int, runs: Collection[str]) -> None:
    """Drop the lines of stages that the schedule of these runs no longer has."""

    def is_kept(line: bytes) -> bool:
        entry = _entry(line)
        return entry is None or entry["run"] not in runs or entry["stage"] <= last_stage

    keep_lines(path, is_kept)


def _entry(line: bytes) -> dict[str, Any] | None:
    """Parse a line of a training; None for a line of another kind, and for one that a kill cut short."""
    entry = value_of(line)
    types = (str, int, int)
    is_ours = entry is not None and all(isinstance(entry.get(key), kind) for key, kind in zip(KEYS, types, strict=True))
    return entry if is_ours else None
