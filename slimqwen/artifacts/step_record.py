"""Records of the finished steps of a run, one file of `.steps/` each."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

FOLDER = ".steps"  # of the records


class StepRecord(BaseModel):
    """The record of a finished step, in a file of `.steps/`."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["slimqwen.step/1"] = "slimqwen.step/1"
    name: str  # of the step
    key: str  # identifies its inputs
    made: str  # the path of its output within the run's folder
    output: str  # the fingerprint of that output
    arithmetic: dict[str, Any]  # the numerical environment of the computation

    @classmethod
    def read(cls, file: Path) -> "StepRecord | None":
        """Read a record; None where there is no valid one, so that the step is done again."""
        try:
            record = cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            return None
        return None if Path(record.made).is_absolute() or ".." in Path(record.made).parts else record


def records_in(run_dir: Path) -> list[StepRecord]:
    """Read the records of the finished steps in a run directory; invalid ones are skipped."""
    found = [StepRecord.read(file) for file in sorted((run_dir / FOLDER).glob("*.json"))]
    return [record for record in found if record is not None]
