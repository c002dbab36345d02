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
from slimqwen.repair.outputs import matrices_of, output_specs
from slimqwen.repair.projection import Projection
from slimqwen.repair.refit import refit, squared_norm
from slimqwen.repair.stream import Stream

# Measured on the built-in teacher, 32 -> 16 experts (docs/repair.md).
RIDGE = 1e-2
SWEEPS = 2

# In the folder of each layer that is finished; the hidden states [rows, seq, hidden] in the last finished layer's only:
MATRICES = "matrices.safetensors"  # the refitted tensors by their names in the checkpoint
STUDENT, TEACHER = "student", "teacher"
ASKED = "asked"  # what the layer under way asks its networks


@dataclass(frozen=True)
class Course:
    """A step of the student and the steps of the teacher at whose end both should be in the same place."""

    student: Step
    teacher: Sequence[Step]

    @property
    def block(self) -> Block:
        """The student's block whose networks are refitted."""
        return _layer_of(self.student)

    @property
    def teacher_block(self) -> Block:
        """The block that the teacher's stream comes out of."""
        return _layer_of(self.teacher[-1])

    @property
    def passes(self) -> int:
        """How often the whole text is gone through: by each step, and by the networks in each sweep."""
        return len(self.teacher) + 1 + SWEEPS


def _layer_of(step: Step) -> Block:
    return next(block for block in step.blocks if block.recall is not None)


def courses(student: Sequence[Step], teacher: Sequence[Step], kept_layers: Sequence[int]) -> list[Course]:
    """Each step of the student with the teacher's steps since the one before, by the teacher layer that it comes from.

    Example: kept_layers 0, 1, 3 of 4, and an MTP module: (0; 0), (1; 1), (2; 2, 3), (mtp; mtp).
    """
    ends = [layer + 1 for layer in kept_layers] + [len(teacher)] * (len(student) - len(kept_layers))
    return [Course(step, teacher[start:end]) for step, start, end in zip(student, [0, *ends[:-1]], ends, strict=True)]


class LayerByLayer:
    """Refits every layer of the student. `projection` makes the student's targets of the teacher's stream."""

    def __init__(self, student: Stream, teacher: Stream, kept_layers: Sequence[int], projection: Projection) -> None:
        self._student, self._teacher, self._projection = student, teacher, projection
        self._tokens = math.prod(student.shape[:2])
        self._courses = courses(student.steps, teacher.steps, kept_layers)

    def run(self, folder: Path, title: str) -> list[Path]:
        """The files with the refitted tensors of each layer. What is finished in `folder` already is kept."""
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
        return [path / MATRICES for path in finished]

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
            self._refit(course, ours, theirs, after, progress)
        self._student.normed(course.student, ours)
        self._teacher.normed(course.teacher[-1], theirs)

    def _begin(self, stream: Stream, before: Path | None, after: Path, name: str) -> Tensor:
        """What goes into a step, in the file where its output will be."""
        if before is None:
            return stream.embed(after / name)
        return stream.open(after / name).copy_(stream.open(before / name))

    def _refit(self, course: Course, ours: Tensor, theirs: Tensor, folder: Path, progress: Progress) -> None:
        """Refit a layer's networks; `ours` is the stream before the layer, then the residual, at last the stream after it."""

        def subtract_from_target(rows: slice) -> None:
            ours[rows] = self._projection(theirs[rows], course.teacher_block) - ours[rows]

        outputs = output_specs(self._student.checkpoint, course.block)
        stored = {spec.name: self._student.checkpoint.read(spec.name).clone() for spec in outputs}
        networks = self._student.ask(course.student, outputs, ours, folder / ASKED, progress)
        for rows in self._student.passes():
            subtract_from_target(rows)  # what the networks should say is left
        residual = ours.flatten(0, 1)
        wanted = squared_norm(residual)
        shares: list[str] = []
        for error in refit(networks, matrices_of(stored.values()), residual, ridge=RIDGE, sweeps=SWEEPS):
            progress.advance(self._tokens if shares else 0)
            shares.append(f"{math.sqrt(error / wanted) if wanted else 0.0:.3f}")
        progress.advance(0, block=course.block.name, error=f"{shares[0]} to {shares[-1]}")
        for rows in self._student.passes():
            subtract_from_target(rows)
        save_file(stored, folder / MATRICES)
        (folder / ASKED).unlink()
