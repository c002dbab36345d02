"""An interface to lm-evaluation-harness: runs a loaded model on a task, and returns its scores per document.

Nothing is downloaded, and the only code run is that of the harness's own tasks and of a folder that the user names.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from transformers import GenerationConfig, PreTrainedTokenizerFast

from slimqwen.artifacts import fingerprint, fingerprint_value
from slimqwen.core.errors import StageFailed, UserError, did_you_mean
from slimqwen.core.progress import say
from slimqwen.model.model import MtpCausalLM

FEWSHOT_SEED = 1234  # the harness's own: every model gets the same examples before the same question
LARGEST_ROUNDING = 1e-9


class Metric(BaseModel):
    """One metric of a task. scores: by document, in the data set's order; None where `value` is not their mean."""

    model_config = ConfigDict(extra="forbid")

    value: float
    stderr: float | None
    scores: list[float] | None


class TaskScores(BaseModel):
    """The scores of a task with documents of its own. metrics: by metric and filter, in the harness's form "acc,none"."""

    model_config = ConfigDict(extra="forbid")

    documents: int
    metrics: dict[str, Metric]


class GroupMetric(BaseModel):
    """A mean over the tasks of a group: with equal weight per document (by_size), or per task."""

    model_config = ConfigDict(extra="forbid")

    value: float
    stderr: float | None
    by_size: bool


class GroupScores(BaseModel):
    """The scores of a group, such as MMLU, and its tasks. metrics: as in `TaskScores`, empty where nothing is averaged."""

    model_config = ConfigDict(extra="forbid")

    tasks: list[str]
    metrics: dict[str, GroupMetric]


class Scores(BaseModel):
    """The scores of one model for one requested name: a task, or a group of them. The outermost group is first."""

    model_config = ConfigDict(extra="forbid")

    tasks: dict[str, TaskScores]
    groups: dict[str, GroupScores]


class Harness:
    """The benchmark tasks that are available on this machine.

    Args:
        names: of tasks, groups or tags.
        tasks_dir: folder with more tasks in the harness's YAML, which override its own of the same name. They may run
            Python from that folder: it is trusted like a program that the user starts.
        limit: documents per task; None is all.
        shots: solved examples before the question; None is the task's own number. A task with 0 of its own keeps 0.

    Raises UserError where the harness is not installed, and for a name that is not a task, group or tag.
    """

    def __init__(
        self, names: Sequence[str], tasks_dir: Path | None = None, limit: int | None = None, shots: int | None = None
    ) -> None:
        if importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None:
            raise UserError(
                "benchmarks need lm-evaluation-harness, which is not installed: pip install 'slimqwen[benchmarks]'."
            )
        if tasks_dir is not None and not tasks_dir.is_dir():
            raise UserError(f"--tasks-dir {tasks_dir} is not a folder: give one that holds the harness's YAML files.")
        self.names = names
        self.limit = limit
        self.shots = shots
        self.tasks_dir = tasks_dir
        with _offline():
            from lm_eval.tasks import TaskManager

            # Built without the harness's own tasks where possible: their index takes 10 to 40 seconds.
            self._manager = TaskManager(include_path=_optional(tasks_dir), include_defaults=False)
            if not all(_is_complete(self._manager, name) for name in names):
                say("benchmarks: reading the index of lm-evaluation-harness's tasks")
                self._manager = TaskManager(include_path=_optional(tasks_dir))
        for name in names:
            if name not in self._manager.all_tasks:
                own = "" if self.tasks_dir is None else f" and no YAML file in {self.tasks_dir} names it"
                raise UserError(
                    f"lm-evaluation-harness has no task '{name}'{did_you_mean(name, self._manager.all_tasks)}{own}: "
                    "`lm-eval ls tasks` lists its own, and --tasks-dir adds yours."
                )

    def identities(self) -> dict[str, dict[str, Any]]:
        """Return, by name, all that a task's scores depend on beside the model. JSON-serialisable.

        Raises one UserError for all data sets that are missing on this machine.
        """
        identities, missing = {}, {}
        for name in self.names:
            try:
                loaded = self._load(name)
            except (OSError, ValueError) as error:  # raised by `datasets` offline, depending on what is missing
                missing[name] = " ".join(str(error).split())[:200]
                continue
            identities[name] = {
                "task": name,
                "harness": importlib.metadata.version("lm_eval"),
                "tasks_dir": None if self.tasks_dir is None else _fingerprint_definitions(self.tasks_dir),
                "data": fingerprint_value({task: _data_identity(loaded["tasks"][task]) for task in loaded["tasks"]}),
                "limit": self.limit,
                "shots": self.shots,
            }
        if missing:
            manager = "TaskManager()" if self.tasks_dir is None else f"TaskManager(include_path='{self.tasks_dir}')"
            raise UserError(
                f"data of {len(missing)} of {len(self.names)} benchmarks is not on this machine, and slimqwen downloads "
                f"nothing: {'; '.join(f'{name} ({reason})' for name, reason in missing.items())}; fill the datasets cache "
                "(HF_HOME) once with network access, by "
                f'`python -c "from lm_eval.tasks import TaskManager; {manager}.load({list(missing)})"`.'
            )
        return identities

    def run(self, model: MtpCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, batch_size: int) -> Scores:
        """Score a model, without its MTP module, on a task. Raises StageFailed where the task itself fails."""
        loaded = self._load(name)
        for task in loaded["tasks"].values():
            self._set_shots(task)
        random.seed(0)
        np.random.seed(FEWSHOT_SEED)
        torch.manual_seed(FEWSHOT_SEED)
        with _offline():
            from lm_eval import evaluator

            try:
                results = evaluator.evaluate(
                    language_model(model, tokenizer, batch_size), loaded, limit=self.limit, log_samples=True
                )
            except Exception as error:  # see _load
                reason = " ".join(str(error).split())[:300]
                raise StageFailed(f"the benchmark '{name}' failed ({type(error).__name__}: {reason}).") from error
        return Scores(
            tasks={task: _task_scores(results, task) for task in loaded["tasks"]},
            groups={group.name: _group_scores(results, group) for group in loaded["groups"].values()},
        )

    def _load(self, name: str) -> dict[str, Any]:
        """Create new task objects, with reset random numbers for their examples."""
        with _offline():
            try:
                return dict(self._manager.load([name]))
            except (OSError, ValueError):
                raise
            except Exception as error:  # a task is third-party code (YAML, Jinja, Python), and may raise anything
                reason = " ".join(str(error).split())[:300]
                raise UserError(
                    f"the benchmark '{name}' cannot be loaded ({type(error).__name__}: {reason})."
                ) from error

    def _set_shots(self, task: Any) -> None:
        own = task.get_config("num_fewshot")
        if own is None or (self.shots is not None and own != 0):
            task.set_config("num_fewshot", self.shots or 0)
        task.set_fewshot_seed(FEWSHOT_SEED)


def language_model(model: MtpCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> Any:
    """Wrap a backbone for the harness, as an HFLM."""
    from lm_eval.models.huggingface import HFLM

    # Replaced: with the repetition penalty of a checkpoint's generation_config.json, "greedy" would not be greedy.
    stop = model.backbone.generation_config.eos_token_id
    model.backbone.generation_config = GenerationConfig(eos_token_id=stop)
    return HFLM(pretrained=model.backbone, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def _optional(folder: Path | None) -> str | None:
    return None if folder is None else str(folder)


def _is_complete(manager: Any, name: str) -> bool:
    """Return whether a task and all its parts are in the manager's index."""
    entry = manager.task_index.get(name)
    parts = [] if entry is None or entry.cfg is None else entry.cfg.get("task", [])
    return entry is not None and all(
        not isinstance(part, str) or _is_complete(manager, part) for part in parts if isinstance(parts, list)
    )


def _task_scores(results: Mapping[str, Any], task: str) -> TaskScores:
    metrics = {}
    for key, value, stderr in _metrics(results["results"][task]):
        metric, filter_name = key.split(",", maxsplit=1)
        of_filter = [sample for sample in results["samples"][task] if sample["filter"] == filter_name]
        scores = [sample[metric] for sample in sorted(of_filter, key=lambda sample: sample["doc_id"])]
        numbers = [float(score) for score in scores if isinstance(score, int | float | np.number)]
        is_mean = len(numbers) == len(scores) > 0 and abs(sum(numbers) / len(numbers) - value) < LARGEST_ROUNDING
        metrics[key] = Metric(value=value, stderr=stderr, scores=numbers if is_mean else None)
    return TaskScores(documents=results["n-samples"][task]["effective"], metrics=metrics)


def _group_scores(results: Mapping[str, Any], group: Any) -> GroupScores:
    by_size = {entry.metric: entry.weight_by_size for entry in group.aggregate_metric_list or []}
    metrics = {
        key: GroupMetric(value=value, stderr=stderr, by_size=by_size[key.split(",", maxsplit=1)[0]])
        for key, value, stderr in (_metrics(results["results"][group.name]) if group.has_aggregation else ())
    }
    return GroupScores(tasks=[task.task_name for task in group.get_all_tasks()], metrics=metrics)


def _metrics(result: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Yield ("acc,none", value, standard error) from {"alias": .., "acc,none": .., "acc_stderr,none": ..}."""
    for key, value in result.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = result.get(f"{metric}_stderr,{filter_name}")
            if not math.isfinite(value):
                raise StageFailed(f"the benchmark '{result['name']}' has {metric} = {value}: it cannot be compared.")
            if not isinstance(stderr, int | float) or not math.isfinite(stderr):
                stderr = None  # "N/A", and NaN for a single document
            yield key, float(value), stderr


def _data_identity(task: Any) -> Any:
    """Identify a task's data by the hash that `datasets` keeps of each split, or by hashes of the single documents."""
    import datasets

    if isinstance(task.dataset, Mapping) and all(isinstance(s, datasets.Dataset) for s in task.dataset.values()):
        return {name: split._fingerprint for name, split in task.dataset.items()}
    return [fingerprint_value(json.loads(json.dumps(document, default=str))) for document in task.eval_docs]


def _fingerprint_definitions(tasks_dir: Path) -> str:
    """Hash the files that define tasks; their data has a hash of its own (`_data_identity`)."""
    files = {path.relative_to(tasks_dir): path for path in sorted(tasks_dir.rglob("*")) if path.is_file()}
    defining = {
        name.as_posix(): fingerprint(path)
        for name, path in files.items()
        if path.suffix in (".yaml", ".py", "") and not any(part.startswith(".") for part in name.parts)  # such as .git
    }
    return fingerprint_value(defining)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Restrict the libraries to their caches, and silence their messages, within this block.

    They read the environment variables at import, which may have happened already, so their modules are changed too.
    """
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_EVALUATE_OFFLINE"] = "1"
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
