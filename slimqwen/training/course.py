"""The course of a run: which rows each optimiser step trains on, and how many tokens the run has seen by then."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from math import ceil, floor

from slimqwen.recipe import DistilRecipe, Duration


@dataclass(frozen=True)
class Level:
    """Consecutive steps of `rows` rows (sequences) each; the first is `first_step` and begins with row `first_row`."""

    first_step: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class Course:
    """Steps, rows and tokens of a whole run, over all its stages. Rows are numbered in the order of the training data.

    A batch that grows from 1 row to 3 over 8 tokens, in a run of 20 tokens and rows of 2:

        step     0    1    2    3      4
        rows     0    1    2 3  4 5 6  7 8 9
    """

    levels: tuple[Level, ...]
    sequence_length: int
    total_steps: int
    warmup_steps: int

    def rows(self, step: int) -> int:
        """Return the number of rows that a step trains on."""
        return self._level(step).rows

    def first_row(self, step: int) -> int:
        """Return the number of a step's first row, which is also the number of rows before the step."""
        level = self._level(step)
        return level.first_row + (step - level.first_step) * level.rows

    def tokens(self, step: int) -> int:
        """Return the number of tokens trained on before a step."""
        return self.first_row(step) * self.sequence_length

    def progress(self, step: int) -> float:
        """Return the run's progress at a step, by tokens: 0 at its first step, 1 at its last."""
        return self.first_row(step) / max(self.first_row(self.total_steps - 1), 1)

    def reaches_multiple(self, step: int, tokens: int) -> bool:
        """Return whether the number of tokens trained on reaches a multiple of `tokens` in a step."""
        return self.tokens(step + 1) // tokens > self.tokens(step) // tokens

    def is_due(self, step: int, every: Duration) -> bool:
        """Return whether a step reaches a multiple of `every`, in steps or tokens of the run; never for one in minutes."""
        if every.unit == "steps":
            return (step + 1) % int(every.amount) == 0
        return every.unit == "tokens" and self.reaches_multiple(step, int(every.amount))

    def step_fractions(self, token_fractions: Sequence[float]) -> list[float]:
        """Convert consecutive shares of the run's tokens into shares of its steps."""
        if len(self.levels) == 1:
            return list(token_fractions)
        rows = self.first_row(self.total_steps)
        ends = [
            float(_steps_before(self.levels, share * rows)) / self.total_steps for share in accumulate(token_fractions)
        ]
        return [end - start for start, end in pairwise([0.0, *ends])]

    def _level(self, step: int) -> Level:
        return self.levels[bisect_right(self.levels, step, key=lambda level: level.first_step) - 1]


def compute_course(recipe: DistilRecipe, sequence_length: int, total_steps: int | None = None) -> Course:
    """Compute the course of a recipe. total_steps: None for as many whole steps as its tokens are enough for."""
    levels = _batch_levels(recipe, sequence_length)
    if total_steps is None:
        total_steps = floor(_steps_before(levels, recipe.tokens // sequence_length))
    warmup_steps = int(recipe.warmup.amount)
    if recipe.warmup.unit == "tokens":
        warmup_steps = ceil(_steps_before(levels, Fraction(warmup_steps, sequence_length)))
    return Course(levels, sequence_length, total_steps, warmup_steps)


def _batch_levels(recipe: DistilRecipe, sequence_length: int) -> tuple[Level, ...]:
    """Compute the levels of the batch size: multiples of the ramp's start, each for an equal part of the ramp's tokens."""
    ramp = recipe.batch_size_ramp
    if ramp is None:
        return (Level(0, 0, recipe.batch_size),)
    levels, step, row = [], 0, 0
    increments = recipe.batch_size // ramp.start - 1
    for number in range(1, increments + 1):
        rows = number * ramp.start
        end = Fraction(ramp.tokens * number, increments * sequence_length)
        steps = max(ceil((end - row) / rows), 0)
        if steps:  # a single step may reach over more than one part
            levels.append(Level(step, row, rows))
        step, row = step + steps, row + steps * rows
    return (*levels, Level(step, row, recipe.batch_size))


def _steps_before(levels: Sequence[Level], row: Fraction | float) -> Fraction:
    """Return how many steps, not necessarily whole, train on the rows before `row`."""
    level = levels[bisect_right(levels, row, key=lambda level: level.first_row) - 1]
    return level.first_step + (Fraction(row) - level.first_row) / level.rows
