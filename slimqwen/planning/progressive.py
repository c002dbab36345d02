"""Spreading a cut over stages (method.md section 7). Every `Target` here is completed."""

import itertools
from collections.abc import Sequence

from slimqwen.core.errors import UserError
from slimqwen.recipe import Schedule, Target

SIZE_MULTIPLE = 8  # tensor cores want bfloat16 matrices whose sides are multiples of 8


def stage_targets(schedule: Schedule, source: Target, target: Target, *, layers_at_once: int = 1) -> list[Target]:
    """Return the shape that each stage ends with; the last is `target`.

    - 'one_shot': [target].
    - 'depth_first': half of the layers to be dropped; then everything else.
    - 'width_first': half of the width cut; then everything else.
    - 'joint': half of both; then everything else.

    Width is all that is not depth: hidden size, experts and top-k together (ours: section 7 leaves it open for
    width_first, and this makes it the mirror image of depth_first). The smaller half goes first (of 3 layers 1, then
    2), but a cut of one goes whole; a hidden or intermediate size is halved in units of 8 where source and target are
    multiples of 8. Heads are few and must divide one another: they go in the last stage.
    A stage that would change nothing is left out (depth_first with no layer to drop has one stage).

    layers_at_once: layers that go together, of which half of all are a whole number.

    Example, layers / hidden / experts / top-k: 48/2048/512/10 -> 36/1536/256/8 goes over 42/2048/512/10 depth_first,
    48/1792/384/9 width_first, 42/1792/384/9 joint; in whole periods of 4 layers over 44/2048/512/10.
    """
    goal = _shape(target)
    halfway = Target(
        **{
            field: _halfway(field, size, goal[field], layers_at_once if field == "num_hidden_layers" else 1)
            for field, size in _shape(source).items()
        }
    )
    first = {
        "one_shot": target,
        "depth_first": source.model_copy(update={"num_hidden_layers": halfway.num_hidden_layers}),
        "width_first": halfway.model_copy(update={"num_hidden_layers": source.num_hidden_layers}),
        "joint": halfway,
    }[schedule]
    return [target] if first in (source, target) else [first, target]


def stage_steps(fractions: Sequence[float], total_steps: int) -> list[int]:
    """Return the optimiser steps of each stage: at least 1 each, `total_steps` together.

    `fractions` are the stages' shares of the tokens and sum to 1. Each stage ends at the step nearest to its cumulated
    share, so rounding never adds up: thirds of 10 steps end at 3.3, 6.7 and 10, which makes 3, 4 and 3 steps.
    """
    stages = len(fractions)
    if total_steps < stages:
        raise UserError(
            f"distil.tokens is enough for {total_steps} optimiser steps, and each of the schedule's {stages} stages "
            "needs one: raise distil.tokens or lower distil.batch_size."
        )
    ends = [0]
    for stage, share in enumerate(itertools.accumulate(fractions), start=1):
        last_end = total_steps - (stages - stage)  # leaves one step to each stage that follows
        ends.append(min(max(round(share * total_steps), ends[-1] + 1), last_end))
    ends[-1] = total_steps  # even where the shares sum to 1 but for rounding
    return [end - start for start, end in itertools.pairwise(ends)]


def _halfway(field: str, source: int, target: int, unit: int) -> int:
    """Return the size after the first of two cuts, by the rule in `stage_targets`."""
    if field.endswith("_heads"):
        return source
    aligned = field.endswith("_size") and source % SIZE_MULTIPLE == target % SIZE_MULTIPLE == 0
    unit = SIZE_MULTIPLE if aligned else unit
    if source - target <= unit:
        return target
    return source - (source - target) // 2 // unit * unit


def _shape(target: Target) -> dict[str, int]:
    """Return the sizes of a target by their names in config.json."""
    shape: dict[str, int] = target.model_dump(exclude_none=True)
    return shape
