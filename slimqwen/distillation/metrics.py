"""metrics.jsonl: one line per optimiser step, of every training run in a run directory."""

import json
from pathlib import Path
from typing import Any

from slimqwen.artifacts import write_text


class MetricsLog:
    """The lines of one training run (`run`, `stage`) in a shared file; lines are appended as steps end."""

    def __init__(self, path: Path, run: str, stage: int) -> None:
        self.path = path
        self.run = run
        self.stage = stage
        path.parent.mkdir(parents=True, exist_ok=True)

    def rewind(self, first_step: int) -> None:
        """Forget this run's lines from `first_step` on: they were written after the state that training resumes from."""
        if self.path.exists():
            lines = [
                line
                for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines()
                if self._survives(line, first_step)
            ]
            write_text(self.path, "".join(line + "\n" for line in lines))

    def _survives(self, line: str, first_step: int) -> bool:
        try:
            entry = json.loads(line)
            return (entry["run"], entry["stage"]) != (self.run, self.stage) or entry["step"] < first_step
        except (ValueError, TypeError, KeyError):  # not one of our lines: cut short by kill -9
            return False

    def append(self, step: int, values: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"run": self.run, "stage": self.stage, "step": step, **values}) + "\n")


def forget_stages_after(path: Path, last_stage: int) -> None:
    """Drop the lines of stages that the schedule no longer has."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if any(_stage(line) > last_stage for line in lines):
            write_text(path, "".join(line + "\n" for line in lines if _stage(line) <= last_stage))


def _stage(line: str) -> int:
    try:
        return int(json.loads(line)["stage"])
    except (ValueError, TypeError, KeyError):  # not one of our lines: nothing to forget
        return 0
