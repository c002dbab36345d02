"""The loop over the stages of a schedule: the only one, for a run and its baselines, for the arms of a study, for a search."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.planning.plan import Plan, cuts_only_channels
from slimqwen.recipe import DepthCriterion, Recipe, Target
from slimqwen.reporting.titles import MAIN_RUN
from slimqwen.runs.checks import ScheduleStage
from slimqwen.runs.stage import Lazy, Store
from slimqwen.runs.stages import Calibrating, DepthMeasuring, Healing, Planning, Pruning, Refitting, TeacherCaching
from slimqwen.runs.training_stages import Carrying, Distilling, Initialising
from slimqwen.shapes.target import target_config


@dataclass(frozen=True)
class Made:
    """What a schedule led to.

    start: the final shape before any training; None where it was reached in several stages.
    trained: after the last stage; None where nothing is trained.
    metrics: the metrics.jsonl of each stage.
    """

    start: Path | None
    trained: Path | None
    metrics: list[Path]

    @property
    def last(self) -> Path:
        """Return the checkpoint that the schedule ends with."""
        made = self.trained or self.start
        assert made is not None
        return made


def follow_schedule(
    recipe: Recipe,
    stages: Sequence[ScheduleStage],
    store: Store,
    *,
    tokens: Path,
    statistics: Path | None = None,
    trains: bool = True,
    run: str = MAIN_RUN,
) -> Made:
    """Measure, plan, cut and train, stage after stage; or initialise and train, for `init: random`.

    Args:
        recipe: the recipe, or a variation of it: a baseline's, an arm's.
        stages: its schedule, or that of the recipe that it varies.
        store: where the artefacts lie. What lies there already is not made again.
        tokens: folder of the recipe's text, written by `tokenize`.
        statistics: the teacher's; None: they are measured as `recipe` needs them.
        trains: False stops before the training of the first stage.
        run: what the lines of metrics.jsonl are labelled with.
    """
    teacher = checkpoint_folder(recipe.teacher)
    source = Checkpoint(teacher)
    cache = None
    if trains and recipe.distil.is_taught and recipe.distil.teacher.kind == "cache":
        cache = store.get(TeacherCaching(recipe, tokens, stages[-1].span.total_steps))
    checkpoint, start, metrics = teacher, None, []
    for stage in stages:
        here, moments = store.within(stage.folder), None
        if recipe.init == "random":
            config = target_config(source.family, source.config, stage.target)
            student = here.get(Initialising(config, recipe.seed, teacher))
        else:
            if stage is not stages[0] or statistics is None:
                statistics = here.get(Calibrating(recipe, checkpoint, tokens))
            student, plan = cut(recipe, checkpoint, statistics, here, tokens=tokens, target=stage.target)
            if stage is not stages[0] and recipe.distil.optimizer.at_cut == "carry":
                moments = Lazy(Carrying(checkpoint, plan), here)
        if len(stages) == 1:
            start = student
        if not trains:
            return Made(start, None, [])
        training = Distilling(recipe, stage, student, tokens, cache, moments, run, store.metrics)
        checkpoint = here.get(training)
        metrics.append(training.metrics or checkpoint.parent / "metrics.jsonl")
    return Made(start, checkpoint, metrics)


def cut(
    recipe: Recipe, checkpoint: Path, statistics: Path, store: Store, *, tokens: Path, target: Target
) -> tuple[Path, Path]:
    """Cut `checkpoint` to `target` by `recipe.pruning`, and return the cut checkpoint and its plan.

    It is refitted where the recipe says so and more than channels are gone, and then healed where the recipe says so.
    """
    source, pruning, depth = Checkpoint(checkpoint), recipe.pruning, None
    if pruning.depth == DepthCriterion.MEASURED and target.num_hidden_layers not in (
        None,
        source.config["num_hidden_layers"],
    ):
        depth = store.get(DepthMeasuring(recipe, checkpoint, statistics, tokens, target))
    plan = store.get(Planning(recipe, checkpoint, statistics, target, depth))
    last = store.get(Pruning(checkpoint, plan))
    if pruning.refit_outputs and not cuts_only_channels(source, Plan.load(plan)):
        last = store.get(Refitting(recipe, last, checkpoint, plan, tokens))
    if recipe.healing is not None:
        last = store.get(Healing(recipe, last, checkpoint, plan, tokens))
    return last, plan
