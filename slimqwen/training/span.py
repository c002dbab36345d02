"""Which optimiser steps of a run a training makes: all that the recipe's tokens are enough for, or a stage's."""

from slimqwen.core.errors import UserError
from slimqwen.recipe import DistilRecipe
from slimqwen.training.course import compute_course
from slimqwen.training.trainer import Span


def total_steps(recipe: DistilRecipe, sequence_length: int) -> int:
    """Return how many optimiser steps the recipe's tokens are enough for. Raises UserError where they do not fill one."""
    course = compute_course(recipe, sequence_length)
    if course.total_steps == 0:
        raise UserError(
            f"distil.tokens = {recipe.tokens:,} is less than one step of {course.rows(0)} sequences of {sequence_length}: "
            "raise tokens or lower batch_size or sequence_length."
        )
    return course.total_steps


def parse_span(steps: str, total: int) -> Span:
    """Parse `FIRST:END` as a span of a run of `total` steps. Raises UserError where it is none."""
    first, colon, end = steps.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end) <= total):
        raise UserError(
            f"--steps {steps}: write it as FIRST:END, two numbers from 0 to {total:,}, the steps that the recipe's tokens are enough for; "
            "END itself belongs to the next stage."
        )
    return Span(int(first), int(end), total)


def whole_run(recipe: DistilRecipe, sequence_length: int) -> Span:
    """Return all steps of the run that the recipe's tokens are enough for."""
    steps = total_steps(recipe, sequence_length)
    return Span(0, steps, steps)
