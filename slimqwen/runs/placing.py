"""The training of a recipe as `shapes/placement.py` takes it: its students, one per stage, and how many tokens each is trained on."""

from typing import get_args

from slimqwen.depth.measure import layers_at_once
from slimqwen.families import Config, Family
from slimqwen.families.count import count
from slimqwen.planning.progressive import stage_targets
from slimqwen.recipe import DepthCriterion, Recipe, Target, TrainedPart
from slimqwen.shapes.placement import Student, Work
from slimqwen.shapes.target import completed, shape_of, size_of, target_config


def work_of(recipe: Recipe, family: Family, config: Config) -> Work:
    """Return the training that a recipe describes. config: of its teacher. Raises UserError for what cannot be cut."""
    targets, fractions = stage_shapes(recipe, family, config)
    students = [target_config(family, config, target) for target in targets]
    distil = recipe.distil
    trained, parts = distil.trained_parts, count(family, config).parts
    return Work(
        family=family,
        teacher=config,
        students=tuple(Student(*pair) for pair in zip(students, fractions, strict=True)),
        rows=distil.batch_size,
        sequence_length=recipe.data.sequence_length,
        tokens=distil.tokens,
        is_taught=distil.is_taught,
        teacher_kind=distil.teacher.kind,
        optimizer=distil.optimizer.kind,
        frozen=tuple(part for part in get_args(TrainedPart) if part in parts and part not in trained),
        loss_chunk_tokens=recipe.execution.loss_chunk_tokens,
        group_rows=distil.batch_size
        if distil.load_balancing_counts.kind == "exact"
        else distil.load_balancing_counts.rows,
    )


def stage_shapes(recipe: Recipe, family: Family, config: Config) -> tuple[list[Target], list[float]]:
    """Return the shape that each stage of a recipe's schedule ends with, and its share of the tokens."""
    if recipe.stages is not None:
        targets: list[Target] = []
        for stage in recipe.stages:  # a field left out keeps what the stage before it left
            before = target_config(family, config, targets[-1]) if targets else config
            targets.append(completed(family, stage.target, before))
        return targets, [stage.token_fraction for stage in recipe.stages]
    assert recipe.target is not None
    final = completed(family, recipe.target, config)
    shape = shape_of(family, config)
    at_once = 1
    if recipe.pruning.depth == DepthCriterion.MEASURED:
        at_once = layers_at_once(config, size_of(shape.num_hidden_layers) - size_of(final.num_hidden_layers))
    targets = (
        [final] if recipe.init == "random" else stage_targets(recipe.schedule, shape, final, layers_at_once=at_once)
    )
    first = recipe.first_stage_token_fraction
    return targets, [1.0] if len(targets) == 1 else [first, 1.0 - first]
