"""metrics.jsonl: one line per optimiser step, of every training run in a run directory; and its copies elsewhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from slimqwen.artifacts import rewrite_text
from slimqwen.distillation.loggers import Logger


class MetricsLog:
    """The lines of one training run (`run`, `stage`) in a shared file; lines are appended as steps end.

    loggers: who else is told, as long as this context is open.
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
        """Forget this run's lines from `first_step` on: they were written after the state that training resumes from."""
        last_step = first_step - 1
        if self.path.exists():
            lines = []
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                step = self._step(line)
                if step is None or step < first_step:
                    lines.append(line)
                else:
                    last_step = max(last_step, step)
            rewrite_text(self.path, "".join(line + "\n" for line in lines if _is_whole(line)))
        for logger in self.loggers:
            logger.begin(first_step, last_step)

    def _step(self, line: str) -> int | None:
        """The step of one of this run's lines, None for others."""
        if not _is_whole(line):
            return None
        entry = json.loads(line)
        return entry["step"] if (entry["run"], entry["stage"]) == (self.run, self.stage) else None

    def append(self, step: int, values: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"run": self.run, "stage": self.stage, "step": step, **values}) + "\n")
        for logger in self.loggers:
            logger.log(step, {name: value for name, value in values.items() if isinstance(value, int | float)})


def _is_whole(line: str) -> bool:
    """Whether this is one of our lines: kill -9 may have cut it short."""
    try:
        entry = json.loads(line)
        return all(key in entry for key in ("run", "stage")) and isinstance(entry["step"], int)
    except (ValueError, TypeError, KeyError):
        return False


def forget_stages_after(path: Path, last_stage: int) -> None:
    """Drop the lines of stages that the schedule no longer has."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if any(_stage(line) > last_stage for line in lines):
            rewrite_text(path, "".join(line + "\n" for line in lines if _stage(line) <= last_stage))


def _stage(line: str) -> int:
    try:
        return int(json.loads(line)["stage"])
    except (ValueError, TypeError, KeyError):  # not one of our lines: nothing to forget
        return 0
