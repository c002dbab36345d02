"""What a training is set to, by its recipe, its text, its span and its execution."""

from dataclasses import dataclass

from slimqwen.recipe import DistilRecipe, Execution, TextSettings
from slimqwen.training.course import Course, compute_course
from slimqwen.training.trainer import Span


@dataclass(frozen=True)
class Settings:
    """What a training is set to. span: the steps of the whole run that are trained."""

    recipe: DistilRecipe
    text: TextSettings
    span: Span
    execution: Execution

    @property
    def course(self) -> Course:
        """The rows of every step of the whole run."""
        return compute_course(self.recipe, self.text.sequence_length, self.span.total_steps)

    @property
    def most_rows(self) -> int:
        """The rows of the largest step: with a batch size ramp, the last one."""
        return self.course.rows(self.span.end_step - 1)
