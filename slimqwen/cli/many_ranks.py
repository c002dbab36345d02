"""Commands that torchrun starts many times: what all ranks of the job do, and what the first does while the others wait."""

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any

import typer

from slimqwen.core.errors import UserError
from slimqwen.core.progress import quiet
from slimqwen.core.torchrun import rank, world_size

# Commands that join the job themselves. Of those that make one stage, the stage's class says so (`Stage.is_shared`).
FOR_ALL = ("run", "demo", "distil")
STAGE_OF = {
    "tokens": "runs.stages.Tokenizing",
    "calibrate": "runs.stages.Calibrating",
    "measure-depth": "runs.stages.DepthMeasuring",
    "plan": "runs.stages.Planning",
    "plan search": "search.gauge.KlMeasuring",
    "prune": "runs.stages.Pruning",
    "refit": "runs.stages.Refitting",
    "heal": "runs.stages.Healing",
    "teacher-cache": "runs.stages.TeacherCaching",
    "carry": "runs.training_stages.Carrying",
    "evaluate": "runs.training_stages.Evaluating",
}
# Commands that train many small models, each by one process.
FOR_ONE = ("study", "pretrain")


def carry_out(name: str, work: Callable[[], Any]) -> Any:
    """Do the work of a command: on all ranks of the job if they share it out, else on the first while the others wait.

    What the command prints, the first rank prints. Raises UserError for a command that is not for many processes.
    """
    if world_size() == 1:
        return work()
    if name in FOR_ONE:
        raise UserError(
            f"'{name}' is work for one process, and torchrun has started {world_size()}: run it without torchrun."
        )
    if is_shared(name):
        with contextlib.redirect_stdout(io.StringIO()) if rank() > 0 else contextlib.nullcontext():
            return work()
    return _by_first(work)


def is_shared(name: str) -> bool:
    """Return whether all ranks of a job do the work of this command together."""
    if name not in STAGE_OF:
        return name in FOR_ALL
    module, _, stage = STAGE_OF[name].rpartition(".")
    return bool(getattr(importlib.import_module(f"slimqwen.{module}"), stage).is_shared)


def _by_first(work: Callable[[], object]) -> None:
    """Do the work on the first rank, while the others wait; each ends with its exit code."""
    if world_size() == 1:
        work()
        return
    import torch

    from slimqwen.parallel.job import join_job

    def act() -> str:
        try:
            work()
        except typer.Exit as end:
            return str(end.exit_code)
        return "0"

    with join_job(torch.device("cpu")) as job, quiet(not job.is_first):  # no other rank needs a GPU
        code = int(job.lead(act))
    if code != 0:
        raise typer.Exit(code)
