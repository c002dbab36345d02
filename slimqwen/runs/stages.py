"""The steps of a recipe: what each is made from, and how. `run`, `study` and the search of shapes have them in common and
differ in where the results lie: a run names its folders by stage, a study by content, and a search throws them away.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimqwen.artifacts import fingerprint
from slimqwen.builtin import checkpoint_folder
from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.text import TRAINING_TEXT
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.data.identity import text_identity
from slimqwen.data.store import load_manifest
from slimqwen.data.tokenize import tokenize
from slimqwen.depth.measure import measure_depth
from slimqwen.evaluation.evaluate import evaluate
from slimqwen.healing.heal import heal
from slimqwen.planning.plan import Plan, cuts_only_channels, plan
from slimqwen.pruning.prune import prune
from slimqwen.recipe import DistilRecipe, HealingRecipe, PruningRecipe, Recipe, Target
from slimqwen.refit.refit import repair
from slimqwen.reporting.titles import MAIN_RUN
from slimqwen.runs.checks import Stage
from slimqwen.runs.pretrain import write_initial
from slimqwen.shapes.target import target_config
from slimqwen.teacher_cache.write import write_teacher_cache
from slimqwen.training.course import course_of
from slimqwen.training.distil import distil, state_folder_of
from slimqwen.training.moments import carry

CALIBRATION_WITHOUT_EFFECT = {"depth_samples"}


@dataclass(frozen=True)
class Work:
    """made_from: all that the weights, or numbers, of the result depend on, by name. make: writes it to a path; the title is shown with its progress."""

    made_from: Mapping[str, Any]
    make: Callable[[Path, str], object]


def tokenized(recipe: Recipe) -> Work:
    data, teacher = recipe.data, checkpoint_folder(recipe.teacher)
    return Work(
        text_identity(data, teacher),
        lambda out, title: tokenize(
            data.sources,
            teacher,
            out,
            heldout_sources=data.heldout_sources,
            heldout_fraction=data.heldout_fraction,
            separator=data.separator,
            execution=recipe.execution,
            title=title,
        ),
    )


def teacher_cached(recipe: Recipe, teacher: Path, tokens: Path, total_steps: int) -> Work:
    """What the teacher says about the text of all the steps, for every stage and baseline."""
    settings: dict[str, Any] = {
        "sequence_length": recipe.data.sequence_length,
        "documents": recipe.data.documents,
        "with_mtp": recipe.distil.is_taught_by_mtp,
        "sequences": course_of(recipe.distil, recipe.data.sequence_length).first_row(total_steps),
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }
    return Work(
        {
            "teacher": Checkpoint(teacher).fingerprint(),
            "tokens": fingerprint(tokens),
            "teacher_cache": recipe.teacher_cache.model_dump(include={"top_k", "exact"}),
            **settings,
        },
        lambda out, title: write_teacher_cache(
            teacher,
            out,
            tokens=tokens,
            recipe=recipe.teacher_cache,
            execution=recipe.execution,
            title=title,
            **settings,
        ),
    )


def calibration_sources(recipe: Recipe, tokens: Path) -> dict[str, Path]:
    """What is calibrated on: the recipe's own sources, or those of the training text; where it is no mixture, the training text."""
    mixed = {name: tokens / name for name in load_manifest(tokens).mixture}
    return recipe.calibration.sources or mixed or {TRAINING_TEXT: tokens}


def calibrated(recipe: Recipe, checkpoint: Path, tokens: Path, pruning: PruningRecipe) -> Work:
    """The statistics of `checkpoint` that `pruning` needs."""
    sources = calibration_sources(recipe, tokens)
    calibration = recipe.calibration.model_copy(update={"sources": sources})
    settings: dict[str, Any] = {
        "sequence_length": recipe.data.sequence_length,
        "seed": recipe.seed,
        "second_moments": pruning.width == "rotation",
        "dtype": recipe.dtype,
    }
    return Work(
        {
            "checkpoint": Checkpoint(checkpoint).fingerprint(),
            "tokens": [fingerprint(folder) for folder in sources.values()],
            "calibration": recipe.calibration.model_dump(mode="json", exclude=CALIBRATION_WITHOUT_EFFECT),
            **settings,
        },
        lambda out, title: calibrate(
            checkpoint, out, recipe=calibration, execution=recipe.execution, title=title, **settings
        ),
    )


def measured_depth(
    recipe: Recipe, checkpoint: Path, statistics: Path, tokens: Path, target: Target, *, refit: bool
) -> Work:
    """What leaving layers out does to `checkpoint`, on the text that was calibrated on."""
    sources = calibration_sources(recipe, tokens)
    settings: dict[str, Any] = {
        "num_hidden_layers": target.num_hidden_layers,
        "refit": refit,
        "samples": max(recipe.calibration.depth_samples, len(sources)),
        "sequence_length": recipe.data.sequence_length,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }
    return Work(
        {
            "checkpoint": Checkpoint(checkpoint).fingerprint(),
            "statistics": fingerprint(statistics),
            "tokens": [fingerprint(folder) for folder in sources.values()],
            **settings,
        },
        lambda out, title: measure_depth(
            checkpoint,
            out,
            statistics=statistics,
            tokens=sources,
            execution=recipe.execution,
            title=title,
            **settings,
        ),
    )


def planned(
    checkpoint: Path, statistics: Path, target: Target, pruning: PruningRecipe, depth: Path | None = None
) -> Work:
    """depth: what leaving layers out does, for `pruning.depth: measured`."""
    return Work(
        {
            "checkpoint": Checkpoint(checkpoint).fingerprint(),
            "statistics": fingerprint(statistics),
            "target": target.model_dump(),
            "pruning": pruning.model_dump(),
            "depth": None if depth is None else fingerprint(depth),
        },
        lambda out, title: plan(checkpoint, out, statistics=statistics, target=target, pruning=pruning, depth=depth),
    )


def pruned(checkpoint: Path, plan_file: Path) -> Work:
    return Work(
        {"checkpoint": Checkpoint(checkpoint).fingerprint(), "plan": fingerprint(plan_file)},
        lambda out, title: prune(checkpoint, out, plan=plan_file, title=title),
    )


def repaired(recipe: Recipe, cut: Path, checkpoint: Path, plan_file: Path, tokens: Path) -> Work:
    """`cut`, which `plan_file` made of `checkpoint`, refitted to it, on the text that was calibrated on."""
    sources = calibration_sources(recipe, tokens)
    settings: dict[str, Any] = {
        "samples": recipe.calibration.samples,
        "sequence_length": recipe.data.sequence_length,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }
    return Work(
        {
            "checkpoint": Checkpoint(checkpoint).fingerprint(),
            "plan": fingerprint(plan_file),
            "tokens": [fingerprint(folder) for folder in sources.values()],
            **settings,
        },
        lambda out, title: repair(
            cut,
            out,
            teacher=checkpoint,
            plan=plan_file,
            tokens=sources,
            execution=recipe.execution,
            title=title,
            **settings,
        ),
    )


def healed(recipe: Recipe, cut: Path, checkpoint: Path, plan_file: Path, tokens: Path, healing: HealingRecipe) -> Work:
    """`cut`, which `plan_file` made of `checkpoint`, its layers trained alone, on the text that was calibrated on."""
    sources = calibration_sources(recipe, tokens)
    settings: dict[str, Any] = {
        "sequence_length": recipe.data.sequence_length,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }
    return Work(
        {
            "student": Checkpoint(cut).fingerprint(),
            "checkpoint": Checkpoint(checkpoint).fingerprint(),
            "plan": fingerprint(plan_file),
            "tokens": [fingerprint(folder) for folder in sources.values()],
            "healing": healing.model_dump(mode="json"),
            **settings,
        },
        lambda out, title: heal(
            cut,
            out,
            teacher=checkpoint,
            plan=plan_file,
            tokens=sources,
            recipe=healing,
            execution=recipe.execution,
            title=title,
            **settings,
        ),
    )


def cut(
    recipe: Recipe,
    checkpoint: Path,
    statistics: Path,
    tokens: Path,
    target: Target,
    pruning: PruningRecipe,
    made: Callable[[str, Work], Path],
) -> tuple[Path, Path]:
    """The cut checkpoint and its plan: refitted where `pruning` says so and more than channels are gone, and healed where it says so.

    made: makes the work of that name where it belongs.
    """
    source, depth = Checkpoint(checkpoint), None
    if pruning.depth == "measured" and target.num_hidden_layers not in (None, source.config["num_hidden_layers"]):
        depth = made(
            "depth.json", measured_depth(recipe, checkpoint, statistics, tokens, target, refit=pruning.experts.refit)
        )
    criteria = pruning.model_copy(update={"healing": None})  # which comes after the plan
    plan_file = made("plan.json", planned(checkpoint, statistics, target, criteria, depth))
    last = made("pruned", pruned(checkpoint, plan_file))
    if pruning.experts.refit and not cuts_only_channels(source, Plan.load(plan_file)):
        last = made("repaired", repaired(recipe, last, checkpoint, plan_file, tokens))
    if pruning.healing is not None:
        last = made("healed", healed(recipe, last, checkpoint, plan_file, tokens, pruning.healing))
    return last, plan_file


def initialised(recipe: Recipe, source: Checkpoint, target: Target) -> Work:
    """The target's shape from random weights."""
    config = target_config(source.family, source.config, target)
    return Work(
        {"config": config, "seed": recipe.seed},
        lambda out, title: write_initial(config, recipe.seed, out, companions=source.folder),
    )


def carried(trained: Path, plan_file: Path) -> Work:
    """The optimiser's moments at the end of `trained`'s training, whose state is kept beside it, cut by the plan."""
    return Work(
        {"trained": Checkpoint(trained).fingerprint(), "plan": fingerprint(plan_file)},
        lambda out, title: carry(state_folder_of(trained), trained, out, plan=plan_file, title=title),
    )


def distilled(
    recipe: Recipe,
    settings: DistilRecipe,
    student: Path,
    *,
    teacher: Path,
    tokens: Path,
    stage: Stage,
    carried: Work | None,
    find: Callable[[Work], Path],
    run: str = MAIN_RUN,
    metrics: Path | None = None,
    teacher_cache: Path | None = None,
) -> Work:
    """The training of one stage by `settings`, the recipe's own or a baseline's; its state stays beside the result.

    carried: the moments that the optimiser goes on with; without, it begins anew.
    find: makes `carried` or finds it; asked when the training begins, for it is twice the model and may go afterwards.
    run, metrics: as `distil` has them.
    """
    span = stage.span
    made_from: dict[str, Any] = {
        "student": Checkpoint(student).fingerprint(),
        "teacher": Checkpoint(teacher).fingerprint(),
        "tokens": fingerprint(tokens),
        "distil": settings.model_dump(mode="json"),
        "sequence_length": recipe.data.sequence_length,
        "documents": recipe.data.documents,
        "span": [span.first_step, span.end_step, span.total_steps],
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }
    if teacher_cache is not None:
        made_from["teacher_cache"] = recipe.teacher_cache.model_dump(include={"top_k", "exact"})
    if carried is not None:
        made_from["carry_from"] = carried.made_from["trained"]
    return Work(
        made_from,
        lambda out, title: distil(
            student,
            out,
            tokens=tokens,
            recipe=settings,
            sequence_length=recipe.data.sequence_length,
            documents=recipe.data.documents,
            teacher=teacher,
            teacher_cache=teacher_cache,
            span=span,
            seed=recipe.seed,
            execution=recipe.execution,
            dtype=recipe.dtype,
            metrics=metrics,
            run=run,
            stage=stage.number,
            title=title,
            keep_state=True,
            moments=None if carried is None else find(carried),
        ),
    )


def evaluated(recipe: Recipe, models: Mapping[str, Path], tokens: Path) -> Work:
    return Work(
        {
            "models": {name: Checkpoint(folder).fingerprint() for name, folder in models.items()},
            "tokens": fingerprint(tokens),
            "evaluation": recipe.evaluation.model_dump(mode="json"),
            "sequence_length": recipe.data.sequence_length,
            "documents": recipe.data.documents,
            "dtype": recipe.dtype,
        },
        lambda out, title: evaluate(
            models,
            out,
            tokens=tokens,
            recipe=recipe.evaluation,
            sequence_length=recipe.data.sequence_length,
            documents=recipe.data.documents,
            execution=recipe.execution,
            dtype=recipe.dtype,
            title=title,
        ),
    )
