"""Student and teacher side by side, layer after layer: what each layer of the student should add, and refitting it to that.

The student's stream is its own: each layer is refitted on what the repaired layers before it hand over, and its target is
where the teacher's stream is after the same layer. So a layer also makes up for what those before it could not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from slimqwen.artifacts import atomic_folder
from slimqwen.calibration.step import Step
from slimqwen.families.family import Block
from slimqwen.progress import Progress
from slimqwen.repair.outputs import output_matrices
from slimqwen.repair.projection import Projection
from slimqwen.repair.refit import refit, squared_norm, subtract_outputs
from slimqwen.repair.stream import Stream, moe_block

# Measured on the built-in teacher, 32 -> 16 experts (docs/repair.md).
RIDGE = 1e-2
SWEEPS = 2

# In the folder of each layer that is finished; the hidden states [rows, seq, hidden] in the last finished layer's only:
MATRICES = "matrices.safetensors"  # the refitted matrices by block name, [experts, hidden, neurons]
STUDENT, TEACHER = "student", "teacher"
ASKED = "asked"  # what the layer under way asks its experts


@dataclass(frozen=True)
class Course:
    """A step of the student and the steps of the teacher at whose end both should be in the same place."""

    student: Step
    teacher: Sequence[Step]

    @property
    def block(self) -> Block | None:
        """The student's block whose experts are refitted, if the step has one."""
        return moe_block(self.student)

    @property
    def teacher_block(self) -> Block:
        """The block that the teacher's stream comes out of."""
        return next(block for block in self.teacher[-1].blocks if block.recall is not None)

    @property
    def passes(self) -> int:
        """How often the whole text is gone through: by each step, and by the experts in each sweep."""
        return len(self.teacher) + 1 + (SWEEPS if self.block is not None else 0)


def courses(student: Sequence[Step], teacher: Sequence[Step], kept_layers: Sequence[int]) -> list[Course]:
    """Each step of the student with the teacher's steps since the one before, by the teacher layer that it comes from.

    Example: kept_layers 0, 1, 3 of 4, and an MTP module: (0; 0), (1; 1), (2; 2, 3), (mtp; mtp).
    """
    ends = [layer + 1 for layer in kept_layers] + [len(teacher)] * (len(student) - len(kept_layers))
    return [Course(step, teacher[start:end]) for step, start, end in zip(student, [0, *ends[:-1]], ends, strict=True)]


class LayerByLayer:
    """Refits every block of the student that routes to experts. `projection` makes the student's targets of the teacher's stream."""

    def __init__(self, student: Stream, teacher: Stream, kept_layers: Sequence[int], projection: Projection) -> None:
        self._student, self._teacher, self._projection = student, teacher, projection
        self._tokens = math.prod(student.shape[:2])
        self._courses = courses(student.steps, teacher.steps, kept_layers)

    def run(self, folder: Path, title: str) -> dict[str, Path]:
        """Block name -> the file with its refitted matrices. What is finished in `folder` already is kept."""
        finished = [folder / f"{number:03d}" for number in range(len(self._courses))]
        found = next((number for number, path in enumerate(finished) if not path.exists()), len(finished))
        passes = [course.passes for course in self._courses]
        total, done = (self._tokens * sum(counts) for counts in (passes, passes[:found]))
        with Progress(title, total=total, unit="tokens", start=done) as progress:
            for number, course in enumerate(self._courses[found:], start=found):
                with atomic_folder(finished[number]) as partial:
                    self._take(course, finished[number - 1] if number else None, partial, progress)
                for path in finished[:number]:
                    for stream in (STUDENT, TEACHER):
                        (path / stream).unlink(missing_ok=True)
        return {
            course.block.name: path / MATRICES
            for course, path in zip(self._courses, finished, strict=True)
            if course.block is not None
        }

    def _take(self, course: Course, before: Path | None, after: Path, progress: Progress) -> None:
        """One step of the student, from the folder of the step before, if there is one, to the folder of this one."""
        theirs = self._begin(self._teacher, before, after, TEACHER)
        for step in course.teacher:
            with self._teacher.weights_of(step):
                self._teacher.advance(step, theirs, progress)
            if step is not course.teacher[-1]:
                self._teacher.normed(step, theirs)
        ours = self._begin(self._student, before, after, STUDENT)
        with self._student.weights_of(course.student):
            if course.block is None:
                self._student.advance(course.student, ours, progress)
            else:
                self._refit(course, course.block, ours, theirs, after, progress)
        self._student.normed(course.student, ours)
        self._teacher.normed(course.teacher[-1], theirs)

    def _begin(self, stream: Stream, before: Path | None, after: Path, name: str) -> Tensor:
        """What goes into a step, in the file where its output will be."""
        if before is None:
            return stream.embed(after / name)
        return stream.open(after / name).copy_(stream.open(before / name))

    def _refit(
        self, course: Course, block: Block, ours: Tensor, theirs: Tensor, folder: Path, progress: Progress
    ) -> None:
        """Refit a block's experts; `ours` is the stream before the layer, then the residual, at last the stream after it."""

        def subtract_from_target(rows: slice) -> None:
            ours[rows] = self._projection(theirs[rows], course.teacher_block) - ours[rows]

        inputs = self._student.ask_experts(course.student, block, ours, folder / ASKED, progress)
        for rows in self._student.passes():
            subtract_from_target(rows)  # what the experts should say is left
        residual = ours.flatten(0, 1)
        wanted = squared_norm(residual)
        matrices = output_matrices(self._student.checkpoint, block)
        subtract_outputs(inputs, matrices, residual)
        shares: list[str] = []
        for error in refit(inputs, matrices, residual, ridge=RIDGE, sweeps=SWEEPS):
            progress.advance(self._tokens if shares else 0)
            shares.append(f"{math.sqrt(error / wanted) if wanted else 0.0:.3f}")
        progress.advance(0, block=block.name, error=f"{shares[0]} to {shares[-1]}")
        for rows in self._student.passes():
            subtract_from_target(rows)
        save_file({block.name: matrices}, folder / MATRICES)
        (folder / ASKED).unlink()
