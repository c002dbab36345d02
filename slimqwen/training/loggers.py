"""Loggers beside metrics.jsonl: TensorBoard, Weights & Biases, trackio. Each is imported only where the recipe names it."""

import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from slimqwen.artifacts import write_text
from slimqwen.core.errors import UserError
from slimqwen.recipe import LoggerName

PROJECT = "slimqwen"  # unless WANDB_PROJECT or TRACKIO_PROJECT is set
ID_FILE = "logged-as"


class Logger(Protocol):
    """Receiver of each step's numbers, on the first rank only."""

    def begin(self, first_step: int, last_step: int) -> None:
        """Begin at `first_step`. Before a resume or a rollback, steps up to `last_step` were logged already."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""

    def close(self) -> None:
        """Finish what is written, and close."""


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raise UserError where the library of a logger is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"execution.loggers names {name}, which is not installed: pip install 'slimqwen[{name}]', or leave it out."
            )


def open_loggers(
    names: Sequence[LoggerName], folder: Path, state_folder: Path, run: str, settings: Mapping[str, Any]
) -> list[Logger]:
    """Open the loggers of one training.

    Args:
        folder: for those that write files.
        state_folder: the training's; the id of its run on a server is stored there, so that a resumed training continues it.
        run: the run's name.
        settings: shown with the run.
    """
    check_loggers(names)
    id_file = state_folder / ID_FILE
    resumes = id_file.exists()
    if not resumes:
        write_text(id_file, uuid.uuid4().hex[:12])
    run_id = id_file.read_text()
    made: dict[LoggerName, Logger] = {
        "tensorboard": TensorBoard(folder / "tensorboard" / run),
        "wandb": WeightsAndBiases(folder, run, run_id, resumes, settings),
        "trackio": Trackio(folder, run, run_id, resumes, settings),
    }
    return [made[name] for name in names]


class TensorBoard:
    """Event files in `folder`. Where training goes back to an earlier step, the curves after it are purged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def begin(self, first_step: int, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class ServedLogger(ABC):
    """Run on a server, which accepts each step only once: steps that were logged before are not logged again.

    After a resume their numbers are the same. After a rollback they differ, and only metrics.jsonl has the new ones.
    """

    def __init__(self, folder: Path, run: str, run_id: str, resumes: bool, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        self._name = f"{run}-{run_id}"
        self._id = run_id
        self._resumes = resumes
        self._settings = dict(settings)
        self._run: Any = None

    @abstractmethod
    def _start(self) -> Any:
        """Start the library's run, an object with `log(values, step=...)` and `finish()`."""

    def begin(self, first_step: int, last_step: int) -> None:
        if self._run is None:
            self._run = self._start()
            self._last_logged = last_step if self._resumes else first_step - 1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._last_logged:
            self._run.log(dict(values), step=step)
            self._last_logged = step

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class WeightsAndBiases(ServedLogger):
    def _start(self) -> Any:
        return import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._name,
            id=self._id,
            resume="allow",
            dir=str(self._folder),
            config=self._settings,
        )


class Trackio(ServedLogger):
    def _start(self) -> Any:
        return import_module("trackio").init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=self._name, resume="allow", config=self._settings
        )
