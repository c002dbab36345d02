"""Benchmarks of several checkpoints side by side: benchmarks.json, and what each lost against the teacher, in pairs.

The same questions are put to both, so the difference is taken question by question: its standard error is several
times smaller than that of two separate scores.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from slimqwen.artifacts import fingerprint_value, makes_file, write_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.core.progress import say
from slimqwen.core.terminal import DataTable
from slimqwen.core.warning import warn
from slimqwen.data.tokenizer import load_tokenizer
from slimqwen.evaluation.benchmark_results import FORMAT, Benchmarks, Result, identity_of
from slimqwen.evaluation.evalplus import EVALPLUS, evalplus_identity, run_evalplus
from slimqwen.evaluation.harness import GroupMetric, Harness, Metric, Scores
from slimqwen.model.device import resolve_device, resolve_dtype
from slimqwen.model.model import load

SUITES = {
    "slimqwen": ("mmlu", "mmlu_pro", "mmlu_redux_generative", "bbh", "gsm8k", EVALPLUS, "ceval-valid", "cmmlu"),
}


class _Finished(BaseModel):
    """What one model made of one task: a file of its own, by which an interrupted command continues."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["slimqwen.benchmark/1"] = "slimqwen.benchmark/1"
    key: str
    scores: Scores


@makes_file("models", kind="benchmarks")
def benchmark(
    models: Mapping[str, Path],
    out: Path,
    *,
    tasks: Sequence[str],
    tasks_dir: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    teacher: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Benchmarks:
    """Run every model on every task and write `out`, a JSON file.

    One model is in memory at a time. Each finished (model, task) is kept in a folder beside `out`, called as it is
    without its suffix, and used again where checkpoint, data and settings are the same.

    Args:
        models: name -> checkpoint folder; the tokenizers may differ.
        tasks: names that lm-evaluation-harness knows, and "evalplus".
        tasks_dir, limit, shots: as in `Harness`; EvalPlus knows none of them.
        batch_size: sequences at a time.
        teacher: the name in `models` that all are compared with; None leaves the differences out.

    Raises:
        UserError: an unknown task, a data set that is not on this machine, a broken checkpoint.
        StageFailed: a task that fails.
    """
    checkpoints = {name: Checkpoint(models[name]) for name in sorted(models, key=lambda name: name != teacher)}
    harness_tasks = [task for task in tasks if task != EVALPLUS]
    harness = Harness(harness_tasks, tasks_dir, limit, shots) if harness_tasks else None
    identities = {} if harness is None else harness.identities()
    if EVALPLUS in tasks:
        identities[EVALPLUS] = evalplus_identity()
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    parts = out.with_suffix("")

    measured = {name: identity_of(checkpoint.folder) for name, checkpoint in checkpoints.items()}
    scores: dict[str, dict[str, Scores]] = {}
    for name, checkpoint in checkpoints.items():
        key = {"checkpoint": measured[name], "dtype": str(torch_dtype), "device": torch_device.type}
        files = {}
        for task in tasks:
            made_from = fingerprint_value(key | identities[task])
            files[task] = (made_from, parts / f"{task.replace('/', '_')}-{made_from[:16]}.json")
        scores[name] = {task: found for task, wanted in files.items() if (found := _read(*wanted)) is not None}
        left = [task for task in tasks if task not in scores[name]]
        if len(left) < len(tasks):
            say(f"benchmarks of {name}: {len(tasks) - len(left)} of {len(tasks)} tasks are done already")
        if EVALPLUS in left:
            say(f"benchmarks of {name}: {EVALPLUS}")
            scores[name][EVALPLUS] = _keep(*files[EVALPLUS], run_evalplus(checkpoint.folder, parts, str(torch_dtype)))
            left.remove(EVALPLUS)
        if left:
            assert harness is not None
            model = load(checkpoint.folder, torch_dtype, torch_device)
            tokenizer = load_tokenizer(checkpoint.folder)
            for task in left:
                say(f"benchmarks of {name}: {task}")
                scores[name][task] = _keep(*files[task], harness.run(model, tokenizer, task, batch_size))
            del model
    result = Benchmarks(
        format=FORMAT,
        teacher=teacher,
        models={name: str(checkpoint.folder) for name, checkpoint in checkpoints.items()},
        identities=measured,
        limit=limit,
        shots=shots,
        results=[
            row
            for name in checkpoints
            for task in tasks
            for row in results_of(name, task, scores[name][task], None if teacher is None else scores[teacher][task])
        ],
    )
    write_json(out, result.model_dump(mode="json"))
    return result


def suite_tasks(name: str) -> list[str]:
    """The tasks of a preset. EvalPlus is left out where it is not installed, and that is said."""
    if name not in SUITES:
        raise UserError(f"--suite {name}{did_you_mean(name, SUITES)}: must be one of {', '.join(SUITES)}.")
    tasks = list(SUITES[name])
    try:
        evalplus_identity()
    except UserError as error:
        warn(f"the suite '{name}' runs without EvalPlus: {error}")
        tasks.remove(EVALPLUS)
    return tasks


def results_of(model: str, asked: str, scores: Scores, teacher: Scores | None) -> Iterator[Result]:
    """The rows of what one name stands for: groups that average something, then the tasks in them."""
    averaged = {name for name, group in scores.groups.items() if group.metrics}
    part_of = asked if asked in averaged else None

    def row(
        task: str, key: str, metric: Metric | GroupMetric, documents: int, paired: tuple[float, float | None] | None
    ) -> Result:
        name, filter_name = key.split(",", maxsplit=1)
        return Result(
            model=model,
            task=task,
            part_of=None if task == asked else part_of,
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
    """(student - teacher, its standard error): sd of d_i = s_i - t_i over the documents (n - 1), over sqrt(n).

    Teacher right, right, wrong, wrong and student right, wrong, wrong, wrong: -0.25 and 0.5 / sqrt(4) = 0.25.
    """
    if student.scores is None or teacher.scores is None:
        return student.value - teacher.value, None
    assert len(student.scores) == len(teacher.scores), "the key of a result holds its data: these were of other data"
    by_document = np.array(student.scores) - np.array(teacher.scores)
    n = len(by_document)
    return float(by_document.mean()), float(by_document.std(ddof=1) / math.sqrt(n)) if n > 1 else None


def group_difference(group: str, key: str, student: Scores, teacher: Scores) -> tuple[float, float | None]:
    """Of a group sum_k w_k d_k, with the standard error sqrt(sum_k (w_k se_k)^2): its tasks are independent samples.

    w_k is the task's share of the documents, or one over the tasks where the group averages these alike.
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
    """Print what was asked for, a model to a column, to stdout; single tasks of a group are in the file."""
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


def _keep(key: str, file: Path, scores: Scores) -> Scores:
    write_json(file, _Finished(key=key, scores=scores).model_dump(mode="json"))
    return scores


def _read(key: str, file: Path) -> Scores | None:
    """What is finished already, or None: a file of something else, or a broken one, is made again."""
    try:
        finished = _Finished.model_validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return finished.scores if finished.key == key else None
