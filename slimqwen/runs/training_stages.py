"""The stages from a cut checkpoint to numbers: initialising, carrying moments, distilling, evaluating."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimqwen.artifacts import atomic_folder
from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint.writer import copy_companions
from slimqwen.evaluation.evaluate import evaluate
from slimqwen.evaluation.kept import REVISION as EVALUATION_REVISION
from slimqwen.families import Config
from slimqwen.model.model import initialise, save
from slimqwen.recipe import Execution, Recipe
from slimqwen.reporting.titles import MAIN_RUN
from slimqwen.runs.checks import ScheduleStage
from slimqwen.runs.stage import Lazy, Stage
from slimqwen.training.distil import REVISION as TRAINING_REVISION
from slimqwen.training.distil import distil, state_folder_of
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.metrics import StepLog
from slimqwen.training.moments import carry


@dataclass(frozen=True)
class Initialising(Stage):
    """A checkpoint of randomly initialised float32 weights: where pretraining and the random baseline start.

    The tokenizer and generation config come from the folder `companions`.
    """

    config: Config
    seed: int
    companions: Path

    file = "initial"
    revision = 1

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {}

    @property
    def method(self) -> Mapping[str, Any]:
        return {"config": self.config, "seed": self.seed}

    def make(self, out: Path, execution: Execution, title: str) -> None:
        model = initialise(self.config, self.seed)
        with atomic_folder(out) as folder:
            save(model, folder, None, self.config, dtype=model.head.dtype)
            copy_companions(self.companions, folder)


@dataclass(frozen=True)
class Carrying(Stage):
    """The optimiser's moments at the end of `trained`'s training, whose state lies beside it, cut by the plan."""

    trained: Path
    plan: Path

    file = "moments"
    revision = 1

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"trained": self.trained, "plan": self.plan}

    @property
    def method(self) -> Mapping[str, Any]:
        return {}

    def make(self, out: Path, execution: Execution, title: str) -> None:
        carry(state_folder_of(self.trained), self.trained, out, plan=self.plan, title=title)

    @property
    def used_up(self) -> Sequence[Path]:
        return [state_folder_of(self.trained)]  # three times the model


@dataclass(frozen=True)
class Distilling(Stage):
    """The training of one stage of a schedule.

    moments: those that the optimiser continues with, twice the model; None: it begins anew. Where the next stage carries
    its moments on, the training's state stays beside the result.
    run, metrics: as `StepLog` has them.
    """

    recipe: Recipe
    stage: ScheduleStage
    student: Path
    tokens: Path
    teacher_cache: Path | None = None
    moments: Lazy | None = None
    run: str = MAIN_RUN
    metrics: Path | None = None

    file = "distilled"
    revision = TRAINING_REVISION
    is_shared = True

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {
            "student": self.student,
            "teacher": checkpoint_folder(self.recipe.teacher),
            "tokens": self.tokens,
            "teacher_cache": self.teacher_cache,
            "moments": self.moments,
        }

    @property
    def method(self) -> Mapping[str, Any]:
        span = self.stage.span
        return {
            "distil": self.recipe.distil,
            "text": self.recipe.text,
            "span": [span.first_step, span.end_step, span.total_steps],
            "label": [self.run, self.stage.number],  # of the lines in metrics.jsonl
        }

    def make(self, out: Path, execution: Execution, title: str) -> None:
        inputs = TrainingInputs(
            self.student,
            self.tokens,
            teacher=checkpoint_folder(self.recipe.teacher),
            teacher_cache=self.teacher_cache,
            moments=None if self.moments is None else self.moments.get(),
        )
        distil(
            inputs,
            out,
            recipe=self.recipe.distil,
            text=self.recipe.text,
            span=self.stage.span,
            execution=execution,
            log=StepLog(self.metrics, self.run, self.stage.number),
            title=title,
            keep_state=True,
        )

    @property
    def lazy(self) -> Sequence[Lazy]:
        return [] if self.moments is None else [self.moments]

    def scratch_of(self, out: Path) -> Sequence[Path]:
        span = self.stage.span
        is_carried_on = self.recipe.distil.optimizer.at_cut == "carry" and span.end_step < span.total_steps
        return () if is_carried_on else [state_folder_of(out)]


@dataclass(frozen=True)
class Evaluating(Stage):
    """The numbers of several models on the held-out text, each compared with the one called `teacher`."""

    recipe: Recipe
    models: Mapping[str, Path]
    tokens: Path

    file = "evaluation.json"
    revision = EVALUATION_REVISION
    is_shared = True

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"models": self.models, "tokens": self.tokens}

    @property
    def method(self) -> Mapping[str, Any]:
        return {"recipe": self.recipe.evaluation, "text": self.recipe.text}

    def make(self, out: Path, execution: Execution, title: str) -> None:
        evaluate(self.models, out, tokens=self.tokens, execution=execution, title=title, **self.method)
