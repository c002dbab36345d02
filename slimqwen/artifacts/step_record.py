"""What is noted of each finished step of a run, in a file of `.steps/`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

FOLDER = ".steps"  # of the records


class StepRecord(BaseModel):
    """What is noted of a finished step, in a file of `.steps/`."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["slimqwen.step/1"] = "slimqwen.step/1"
    name: str  # of the step
    key: str  # of what it was made from
    made: str  # the path of its output within the folder
    output: str  # whose fingerprint this is
    arithmetic: dict[str, Any]  # that it was computed with

    @classmethod
    def read(cls, file: Path) -> "StepRecord | None":
        """None where there is none, and where it cannot be read: then the step is done again."""
        try:
            record = cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            return None
        return None if Path(record.made).is_absolute() or ".." in Path(record.made).parts else record


def records_in(run_dir: Path) -> list[StepRecord]:
    """What the finished steps of a run directory left; what cannot be read is no record."""
    found = [StepRecord.read(file) for file in sorted((run_dir / FOLDER).glob("*.json"))]
    return [record for record in found if record is not None]
