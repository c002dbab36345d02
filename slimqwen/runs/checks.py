"""Before a run: what would stop it hours later is found now, and what was derived from the recipe is said."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from slimqwen.calibration.statistics import check_source_weights
from slimqwen.calibration.text import TRAINING_TEXT, CalibrationText
from slimqwen.checkpoint.readable import check_companions
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.core.progress import say
from slimqwen.core.warning import warn
from slimqwen.data.announcement import notes_of_length, notes_of_passes
from slimqwen.data.frame import check_separator
from slimqwen.data.sources import check_sources, describe, is_mixture, name_of
from slimqwen.data.store import load_manifest, training_stream
from slimqwen.data.tokenizer import check_tokenizer_files
from slimqwen.families.count import Counts, count
from slimqwen.healing.heal import check_samples
from slimqwen.model.device import resolve_device, resolve_dtype
from slimqwen.model.kernels import check_expert_sizes, check_gradients
from slimqwen.model.native import check_buildable
from slimqwen.parallel.ranks import check_shares
from slimqwen.planning.depth import kept_layers
from slimqwen.planning.mtp_rotation import stretches
from slimqwen.planning.progressive import stage_steps
from slimqwen.recipe import BUILTIN_TEACHER, DepthCriterion, Recipe, Target, WidthCriterion
from slimqwen.runs.places import check_apart, inputs_of
from slimqwen.runs.placing import stage_shapes
from slimqwen.serving.loadable import loadable, refusals_in_words
from slimqwen.shapes.target import shape_of, size_of, target_config
from slimqwen.teacher_cache.write import check_teacher
from slimqwen.training.cached_teacher import check_temperature
from slimqwen.training.course import compute_course
from slimqwen.training.inputs import check_batch, check_terms
from slimqwen.training.loggers import check_loggers
from slimqwen.training.optimizer import check_optimizer, check_trained
from slimqwen.training.span import total_steps
from slimqwen.training.trainer import Span


@dataclass(frozen=True)
class ScheduleStage:
    """One cut of a schedule and the training steps that follow it.

    folder: what a run calls the folder of its artefacts; "" for the run's own.
    """

    number: int
    target: Target
    span: Span
    folder: str


def check(recipe: Recipe, source: Checkpoint) -> None:
    """Raise UserError now for what would otherwise stop the run after hours."""
    teacher = source.folder
    check_tokenizer_files(teacher)
    check_separator(teacher, recipe.data.separator)
    check_buildable(source.family, source.config, str(teacher))
    check_experts(recipe, source.config["hidden_size"], source.config["moe_intermediate_size"], "in the teacher")
    check_sources(recipe.data.sources, recipe.data.heldout_sources)
    check_apart("run_dir", recipe.run_dir, inputs_of(recipe))
    length, sources = recipe.data.sequence_length, recipe.calibration.sources
    if sources:
        CalibrationText(sources, source, samples=recipe.calibration.samples, sequence_length=length, seed=recipe.seed)
    mixed = [name_of(source) for source in recipe.data.sources] if is_mixture(recipe.data.sources) else []
    calibrated_on = list(sources) or mixed or [TRAINING_TEXT]
    if recipe.pruning.source_weights is not None:
        check_source_weights(recipe.pruning.source_weights, calibrated_on)
    if recipe.healing is not None:
        check_samples(recipe.healing.samples, len(calibrated_on))
    check_companions(teacher)
    check_gradients(source.family, source.config, resolve_device(recipe.execution.device))
    check_loggers(recipe.execution.loggers)
    check_terms(recipe.distil, student=source, teacher=source)  # the student is cut from the teacher
    check_optimizer(recipe.distil.optimizer, source, offloads=recipe.execution.offload != "none")
    check_trained(recipe.distil, source)
    if recipe.distil.optimizer.at_cut == "carry" and recipe.pruning.width == WidthCriterion.ROTATION:
        raise UserError(
            "moments cannot follow a rotation of the weights: set distil.optimizer.at_cut: reset, or pruning.width: "
            "norm_activation."
        )
    if recipe.distil.is_taught and recipe.distil.teacher.kind == "cache":
        if recipe.execution.bad_steps.action == "roll_back":
            raise UserError(
                "execution.bad_steps 'roll_back' goes on to later rows of the text, and the teacher cache of a run with distil.teacher "
                "'cache' does not hold them: choose stop or skip, or teacher: live."
            )
        check_teacher(recipe.distil.teacher, source, with_mtp=recipe.distil.is_taught_by_mtp)
        check_temperature(recipe.distil, recipe.distil.teacher.top_k, source.config["vocab_size"])
    random = recipe.init == "random" or "random_init" in recipe.baselines
    if random and any(spec.part == "vision" for spec in source.specs.values()):
        raise UserError(
            f"random weights for the vision tower of {teacher} cannot be made: leave out init: random and the random_init "
            "baseline, or use the text model."
        )


def check_shared(recipe: Recipe, source: Checkpoint, stages: Sequence[ScheduleStage], ranks: int) -> None:
    """Raise UserError now where `ranks` ranks could not train together, as each training would when it begins."""
    if ranks == 1:
        return
    shard_ranks, expert_ranks = recipe.execution.shard_ranks, recipe.execution.expert_ranks
    check_shares(
        ranks, shard_ranks if isinstance(shard_ranks, int) else None, expert_ranks if expert_ranks != "auto" else None
    )
    check_batch(recipe.distil, ranks)
    check_optimizer(recipe.distil.optimizer, source, ranks)
    experts = [source.config["num_experts"], *(stage.target.num_experts for stage in stages)]
    for num_experts in experts:
        if expert_ranks != "auto" and num_experts and num_experts % expert_ranks:
            raise UserError(
                f"execution.expert_ranks {expert_ranks} does not divide the {num_experts} experts that the teacher or a stage of "
                "the schedule has: choose a divisor."
            )


def check_experts(recipe: Recipe, hidden: int, intermediate: int, where: str) -> None:
    """Raise UserError for experts of a size that cannot be computed with in the dtypes of this run."""
    device = resolve_device(recipe.execution.device)
    trained = torch.bfloat16 if device.type == "cuda" else torch.float32  # autocast, on a GPU
    for dtype in (trained, resolve_dtype(recipe.dtype, device)):
        check_expert_sizes(hidden, intermediate, dtype, where)


def check_heldout(tokens: Path, recipe: Recipe) -> None:
    """Raise UserError where there is too little held-out text for evaluation."""
    needed = max(recipe.data.sequence_length, recipe.evaluation.acceptance.prompt_tokens) + 1
    heldout = load_manifest(tokens).heldout.tokens
    if heldout < needed:
        raise UserError(
            f"the held-out text has {heldout:,} tokens, and evaluation needs {needed:,} at least: "
            "add text, raise data.heldout_fraction or give data.heldout_sources."
        )


def announce_text(tokens: Path, recipe: Recipe, total_steps: int) -> None:
    """Say how often the run reads its training text, where that is too often. Raises UserError where there is too little."""
    length = recipe.data.sequence_length
    stream = training_stream(tokens, length, recipe.seed, recipe.data.documents)
    for note in notes_of_passes(stream, compute_course(recipe.distil, length).first_row(total_steps)):
        warn(note)


def stages_of(recipe: Recipe, source: Checkpoint) -> list[ScheduleStage]:
    """Return the stages of a recipe's schedule, with their shapes and steps. Raises UserError for what cannot be cut."""
    config = source.config
    targets, fractions = stage_shapes(recipe, source.family, config)
    if recipe.init == "pruned":
        if recipe.pruning.depth == DepthCriterion.LAST or {"paper", "paper_pruned"} & set(recipe.baselines):
            check_depth(source, targets)
        if recipe.pruning.width == WidthCriterion.ROTATION and targets[-1].hidden_size != config["hidden_size"]:
            stretches(source)  # raises where this model cannot be rotated
    total = total_steps(recipe.distil, recipe.data.sequence_length)
    fractions = compute_course(recipe.distil, recipe.data.sequence_length).step_fractions(fractions)
    stages, done = [], 0
    for number, (target, steps) in enumerate(zip(targets, stage_steps(fractions, total), strict=True), start=1):
        after = target_config(source.family, config, target)
        check_experts(recipe, after["hidden_size"], after["moe_intermediate_size"], f"after stage {number}")
        stages.append(ScheduleStage(number, target, Span(done, done + steps, total), f"stage-{number}"))
        done += steps
    return stages


def in_one_stage(stages: Sequence[ScheduleStage], folder: str) -> list[ScheduleStage]:
    """Return the schedule that reaches the last stage's shape at once, with all the steps; its artefacts lie in `folder`."""
    last = stages[-1]
    return [ScheduleStage(1, last.target, Span(0, last.span.total_steps, last.span.total_steps), folder)]


def check_depth(source: Checkpoint, targets: list[Target]) -> None:
    """Raise UserError where dropping the last layers, stage after stage, would leave none that attends in full."""
    kept = list(range(source.config["num_hidden_layers"]))
    attends = source.family.attention_layers(source.config)
    for target in targets:
        remaining = [layer for layer in attends if layer < len(kept)]
        kept = kept_layers(
            DepthCriterion.LAST, len(kept), size_of(target.num_hidden_layers), must_keep_one_of=remaining
        )


def announce(recipe: Recipe, source: Checkpoint, stages: list[ScheduleStage]) -> None:
    """Say what was derived from the recipe before hours are spent on it."""
    family, config = source.family, source.config
    before = count(family, config)
    course = compute_course(recipe.distil, recipe.data.sequence_length)
    say(f"teacher   {source.folder}: {_shape(shape_of(source.family, config), before)}")
    for stage in stages:
        after = count(family, target_config(family, config, stage.target))
        tokens = course.tokens(stage.span.end_step) - course.tokens(stage.span.first_step)
        share = after.total_parameters / before.total_parameters
        say(f"stage {stage.number}   {_shape(stage.target, after)} ({share:.1%} of the teacher), {tokens:,} tokens")
    for note in (*notes_of_serving(source, stages[-1].target), *notes_of_calibration(recipe)):
        warn(note)
    for note in notes_of_length(config, recipe.data.sequence_length):
        warn(note)
    if course.warmup_steps >= course.total_steps:
        warn(
            f"note: the warm-up of {course.warmup_steps:,} steps is not shorter than the run's {course.total_steps:,}: "
            "the learning rate only rises."
        )
    if course.rows(course.total_steps - 1) < recipe.distil.batch_size:
        warn(
            f"note: the run ends before distil.batch_size_ramp does, with {course.rows(course.total_steps - 1)} of "
            f"{recipe.distil.batch_size} sequences per step."
        )


def notes_of_serving(source: Checkpoint, target: Target) -> list[str]:
    """Return a sentence for each engine that would not load the final shape; which layers go, `plan` decides later."""
    family, config = source.family, source.config
    layers = list(range(size_of(target.num_hidden_layers)))
    cut = target_config(family, config, target, layers)
    refusals = loadable(family, config, cut, source.layouts, layers=layers).refusals
    return [
        f"warning: the result of this run {words} (docs/serving.md; another target may load)."
        for words in refusals_in_words(refusals)
    ]


def notes_of_calibration(recipe: Recipe) -> list[str]:
    """Return a sentence where the weights are refitted by text of one source alone, and what to do about it.

    None for the built-in teacher, which was trained on nothing else.
    """
    pruning, sources = recipe.pruning, recipe.calibration.sources or recipe.data.sources
    learns = pruning.refit_readers or pruning.refit_outputs or recipe.healing is not None
    if len(sources) != 1 or not learns or recipe.init == "random" or recipe.teacher == BUILTIN_TEACHER:
        return []
    name = next(iter(recipe.calibration.sources), None) or describe(recipe.data.sources[0])
    return [
        f"note: what stays is chosen, and its weights are refitted, by one source of text ({name}): part of what that wins is lost on "
        "text of other kinds. Where the model is for several, give calibration.sources a folder of `slimqwen tokens` for each, "
        "or data.sources one source with a weight for each."
    ]


def _shape(target: Target, counts: Counts) -> str:
    return (
        f"{target.num_hidden_layers} layers, hidden {target.hidden_size}, {target.num_experts} experts "
        f"top-{target.num_experts_per_tok}: {counts.total_parameters:,} parameters, {counts.active_parameters:,} active"
    )
