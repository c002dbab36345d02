"""Benchmarks of several checkpoints: benchmarks.json, with the paired difference of each from the teacher.

All answer the same questions, so differences are computed per question: their standard error is several
times smaller than that of two separate scores.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from slimqwen.artifacts import fingerprint_value, makes_file, write_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.core.progress import quiet, say
from slimqwen.core.terminal import DataTable
from slimqwen.core.warning import warn
from slimqwen.data.tokenizer import load_tokenizer
from slimqwen.evaluation.benchmark_results import FORMAT, Benchmarks, Result, identity_of
from slimqwen.evaluation.evalplus import EVALPLUS, evalplus_identity, run_evalplus
from slimqwen.evaluation.harness import GroupMetric, Harness, Metric, Scores
from slimqwen.evaluation.loading import load_for_all
from slimqwen.model.device import resolve_device, resolve_dtype
from slimqwen.model.model import generation_config
from slimqwen.parallel.job import Job, join_job
from slimqwen.parallel.lockstep import generate_in_step
from slimqwen.recipe import Execution

SUITES = {
    "slimqwen": ("mmlu", "mmlu_pro", "mmlu_redux_generative", "bbh", "gsm8k", EVALPLUS, "ceval-valid", "cmmlu"),
}


class _Finished(BaseModel):
    """The scores of one model on one task, in a file of their own, so that an interrupted command continues."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["slimqwen.benchmark/1"] = "slimqwen.benchmark/1"
    key: str
    scores: Scores


@dataclass(frozen=True)
class Tasks:
    """The tasks to run.

    names: of tasks in lm-evaluation-harness, and "evalplus". tasks_dir, limit, shots: as in `Harness`; ignored by EvalPlus.
    """

    names: Sequence[str]
    tasks_dir: Path | None = None
    limit: int | None = None
    shots: int | None = None

    def harness(self) -> Harness | None:
        """Open the tasks of lm-evaluation-harness; None where there are none."""
        names = [name for name in self.names if name != EVALPLUS]
        return Harness(names, self.tasks_dir, self.limit, self.shots) if names else None


@makes_file("models", kind="benchmarks")
def benchmark(
    models: Mapping[str, Path],
    out: Path,
    tasks: Tasks,
    *,
    teacher: str | None = None,
    execution: Execution = Execution(),  # noqa: B008 - immutable
    dtype: str = "auto",
) -> Benchmarks:
    """Run every model on every task and write `out`, a JSON file.

    One model is in memory at a time. Each finished (model, task) is kept in a folder beside `out`, with its name without
    the suffix, and reused where checkpoint, data and settings are the same.

    All processes that torchrun started may call it together: each model is sharded over them, and all answer the same questions
    at once (so they are no faster than one that could hold the model). EvalPlus, a program of its own, runs on the first.

    Args:
        models: name -> checkpoint folder; the tokenizers may differ.
        teacher: the name in `models` that all are compared with; None: no differences.

    Raises:
        UserError: for an unknown task, a data set that is not on this machine, a broken checkpoint.
        StageFailed: where a task fails.
    """
    checkpoints = {name: Checkpoint(models[name]) for name in sorted(models, key=lambda name: name != teacher)}
    device = resolve_device(execution.device)
    with join_job(device) as job, quiet(not job.is_first):
        harness = tasks.harness()
        identities = {} if harness is None else harness.identities()
        if EVALPLUS in tasks.names:
            identities[EVALPLUS] = evalplus_identity()
        runner = _Runner(
            harness, identities, out.with_suffix(""), resolve_dtype(dtype, device), device, job, execution=execution
        )
        measured = {name: identity_of(checkpoint.folder) for name, checkpoint in checkpoints.items()}
        scores = {name: runner.run(name, checkpoint, measured[name]) for name, checkpoint in checkpoints.items()}
        result = Benchmarks(
            format=FORMAT,
            teacher=teacher,
            models={name: str(checkpoint.folder) for name, checkpoint in checkpoints.items()},
            identities=measured,
            limit=tasks.limit,
            shots=tasks.shots,
            results=[
                row
                for name in checkpoints
                for task in tasks.names
                for row in results_of(
                    name, task, scores[name][task], None if teacher is None else scores[teacher][task]
                )
            ],
        )
        if job.is_first:
            write_json(out, result.model_dump(mode="json"))
        job.wait()
    return result


class _Runner:
    """A runner of tasks on one model after another, with each finished (model, task) in a file of `folder`.

    identities: task -> what its scores depend on beside the model; all of these tasks are run.
    """

    def __init__(
        self,
        harness: Harness | None,
        identities: Mapping[str, Mapping[str, Any]],
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        job: Job,
        *,
        execution: Execution,
    ) -> None:
        self._harness = harness
        self._identities = identities
        self._folder = folder
        self._dtype, self._device, self._job = dtype, device, job
        self._execution = execution

    def run(self, name: str, checkpoint: Checkpoint, identity: str) -> dict[str, Scores]:
        """Run every task that is not finished. name: for messages. identity: `identity_of(checkpoint.folder)`."""
        files = {task: self._file(task, identity) for task in self._identities}
        scores = {task: found for task in files if (found := self._finished(*files[task])) is not None}
        left = [task for task in files if task not in scores]
        if len(left) < len(files):
            say(f"benchmarks of {name}: {len(files) - len(left)} of {len(files)} tasks are done already")
        if EVALPLUS in left:
            say(f"benchmarks of {name}: {EVALPLUS}")

            def run_alone() -> str:
                return run_evalplus(checkpoint.folder, self._folder, str(self._dtype)).model_dump_json()

            found = Scores.model_validate_json(self._job.lead(run_alone))
            scores[EVALPLUS] = self._keep(*files[EVALPLUS], found)
            left.remove(EVALPLUS)
        if left:
            assert self._harness is not None
            model = load_for_all(checkpoint, self._execution, self._dtype, self._device, self._job)
            if not self._job.is_alone:
                model.backbone.generation_config = generation_config(checkpoint.folder, model.backbone)
                generate_in_step(model.backbone)
            tokenizer = load_tokenizer(checkpoint.folder)
            for task in left:
                say(f"benchmarks of {name}: {task}")
                with nullcontext() if self._job.is_first else _without_stderr():
                    found = self._harness.run(model, tokenizer, task, self._execution.batch_size)
                scores[task] = self._keep(*files[task], found)
        return scores

    def _finished(self, key: str, file: Path) -> Scores | None:
        """Read finished scores, on every rank what the first finds."""

        def read() -> str:
            found = _read(key, file)
            return "" if found is None else found.model_dump_json()

        found = self._job.lead(read)
        return Scores.model_validate_json(found) if found else None

    def _keep(self, key: str, file: Path, scores: Scores) -> Scores:
        if self._job.is_first:
            write_json(file, _Finished(key=key, scores=scores).model_dump(mode="json"))
        return scores

    def _file(self, task: str, identity: str) -> tuple[str, Path]:
        """Return the key of a task's scores, and their file."""
        model = {"checkpoint": identity, "dtype": str(self._dtype), "device": self._device.type}
        key = fingerprint_value(model | dict(self._identities[task]))
        return key, self._folder / f"{task.replace('/', '_')}-{key[:16]}.json"


def suite_tasks(name: str) -> list[str]:
    """Return the tasks of a preset. EvalPlus is left out, with a warning, where it is not usable."""
    if name not in SUITES:
        raise UserError(f"--suite {name}{did_you_mean(name, SUITES)}: must be one of {', '.join(SUITES)}.")
    tasks = list(SUITES[name])
    try:
        evalplus_identity()
    except UserError as error:
        warn(f"the suite '{name}' runs without EvalPlus: {error}")
        tasks.remove(EVALPLUS)
    return tasks


def results_of(model: str, requested: str, scores: Scores, teacher: Scores | None) -> Iterator[Result]:
    """Yield the results of a requested name: of groups with averages, then of the tasks in them."""
    averaged = {name for name, group in scores.groups.items() if group.metrics}
    part_of = requested if requested in averaged else None

    def row(
        task: str, key: str, metric: Metric | GroupMetric, documents: int, paired: tuple[float, float | None] | None
    ) -> Result:
        name, filter_name = key.split(",", maxsplit=1)
        return Result(
            model=model,
            task=task,
            part_of=None if task == requested else part_of,
            metric=name,
            filter=filter_name,
            value=metric.value,
            stderr=metric.stderr,
            documents=documents,
            difference=None if paired is None else paired[0],
            difference_stderr=None if paired is None else paired[1],
        )

    for name, group in scores.groups.items():
        for key, of_group in group.metrics.items():
            members = [task for task in group.tasks if key in scores.tasks[task].metrics]
            documents = sum(scores.tasks[task].documents for task in members)
            paired = None if teacher is None else group_difference(name, key, scores, teacher)
            yield row(name, key, of_group, documents, paired)
    for name, task in scores.tasks.items():
        for key, of_task in task.metrics.items():
            paired = None if teacher is None else difference(of_task, teacher.tasks[name].metrics[key])
            yield row(name, key, of_task, task.documents, paired)


def difference(student: Metric, teacher: Metric) -> tuple[float, float | None]:
    """Return (student - teacher, its standard error): sd of d_i = s_i - t_i over the documents (n - 1), over sqrt(n).

    Teacher right, right, wrong, wrong and student right, wrong, wrong, wrong: -0.25 and 0.5 / sqrt(4) = 0.25.
    """
    if student.scores is None or teacher.scores is None:
        return student.value - teacher.value, None
    assert len(student.scores) == len(teacher.scores), "a result's key includes its data, so these must be of the same"
    by_document = np.array(student.scores) - np.array(teacher.scores)
    n = len(by_document)
    return float(by_document.mean()), float(by_document.std(ddof=1) / math.sqrt(n)) if n > 1 else None


def group_difference(group: str, key: str, student: Scores, teacher: Scores) -> tuple[float, float | None]:
    """Return a group's difference sum_k w_k d_k and standard error sqrt(sum_k (w_k se_k)^2): its tasks are independent.

    w_k is the task's share of the documents, or one over the number of tasks where the group weights them equally.
    """
    members = [task for task in student.groups[group].tasks if key in student.tasks[task].metrics]
    sizes = np.array([student.tasks[task].documents for task in members], dtype=np.float64)
    by_size = student.groups[group].metrics[key].by_size
    weights = sizes / sizes.sum() if by_size else np.full(len(members), 1 / len(members))
    paired = [difference(student.tasks[task].metrics[key], teacher.tasks[task].metrics[key]) for task in members]
    value = sum(w * d for w, (d, _) in zip(weights, paired, strict=True))
    errors = [stderr for _, stderr in paired if stderr is not None]
    if len(errors) < len(members):
        return float(value), None
    return float(value), math.sqrt(sum((w * e) ** 2 for w, e in zip(weights, errors, strict=True)))


def print_benchmarks(benchmarks: Benchmarks) -> None:
    """Print the requested results to stdout, one model per column; the single tasks of groups are only in the file."""
    limit = "" if benchmarks.limit is None else f", the first {benchmarks.limit} documents of each task only"
    against = "" if benchmarks.teacher is None else f"; in brackets: minus {benchmarks.teacher}, paired"
    title = f"benchmarks ± standard error{against}{limit}"
    table = DataTable("task", "metric", "n", *benchmarks.models, title=title, left=2)
    for (task, metric), by_model in benchmarks.lines().items():
        documents = next(iter(by_model.values())).documents
        cells = [_cell(by_model[name], name == benchmarks.teacher) for name in benchmarks.models]
        table.add(task, metric, f"{documents:,}", *cells)
    table.show()


def _cell(result: Result, is_teacher: bool) -> str:
    return result.score if result.change is None or is_teacher else f"{result.score} ({result.change})"


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Show nothing of the harness's progress, which the first rank shows already."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        yield


def _read(key: str, file: Path) -> Scores | None:
    """Read finished scores; None, so that they are measured, where the file is missing, invalid or has another key."""
    try:
        finished = _Finished.model_validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return finished.scores if finished.key == key else None
