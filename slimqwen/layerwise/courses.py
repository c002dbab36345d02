"""Which layers of the teacher each layer of the student stands for."""

from collections.abc import Sequence
from dataclasses import dataclass

from slimqwen.families.family import Block
from slimqwen.layerwise.step import Step


@dataclass(frozen=True)
class Course:
    """A step of the student and the steps of the teacher at whose end both should be in the same place."""

    student: Step
    teacher: Sequence[Step]

    @property
    def block(self) -> Block:
        """The student's block that is changed."""
        return _layer_of(self.student)

    @property
    def teacher_block(self) -> Block:
        """The block that the teacher's stream comes out of."""
        return _layer_of(self.teacher[-1])


def _layer_of(step: Step) -> Block:
    return next(block for block in step.blocks if block.recall is not None)


def pair_courses(student: Sequence[Step], teacher: Sequence[Step], kept_layers: Sequence[int]) -> list[Course]:
    """Return each step of the student with the teacher's steps that it stands for: its own, and dropped ones.

    A layer before a gap stands for the layers in it, so that the next one has the input that it had in the teacher, and
    the last one ends where the teacher does.

    Example: kept_layers 0, 1, 3 of 5, and an MTP module: (0; 0), (1; 1, 2), (3; 3, 4), (mtp; mtp).
    """
    mtp = len(student) - len(kept_layers)
    ends = [*kept_layers[1:], len(teacher) - mtp] + [len(teacher)] * mtp
    return [Course(step, teacher[start:end]) for step, start, end in zip(student, [0, *ends[:-1]], ends, strict=True)]
