"""Student and teacher side by side, layer after layer, each layer of the student changed so that it ends where the teacher does.

The student's stream is its own: each layer is changed on the output of the changed layers before it, and its target is
where the teacher's stream is after the same layer. So a layer also corrects what those before it could not.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from slimqwen.core.progress import Progress
from slimqwen.families.family import Block
from slimqwen.layerwise.courses import Course, pair_courses
from slimqwen.layerwise.ranks import AnyJob
from slimqwen.layerwise.stream import Stream
from slimqwen.layerwise.walk import walk_layers

# In the folder of each layer that is finished; the hidden states [rows, seq, hidden] in the last finished layer's only:
CHANGED = "changed.safetensors"  # the changed tensors by their names in the checkpoint
STUDENT, TEACHER = "student", "teacher"


class Target:
    """Where the student's stream should be after a layer: the teacher's there, in the student's coordinates.

    teacher_stream: the teacher's as it is, float32 [rows, seq, teacher's hidden], without the norm that may follow.
    """

    def __init__(self, teacher_stream: Tensor, project: Callable[[Tensor], Tensor]) -> None:
        self.teacher_stream, self._project = teacher_stream, project

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Return the target of some of the text's rows, float32 [rows, seq, hidden]."""
        return self._project(self.teacher_stream[rows])


class LayerProgress:
    """Progress within a layer that the text goes through `passes` times, which count as one."""

    def __init__(self, progress: Progress, passes: int) -> None:
        self._progress, self._passes = progress, passes
        self._done = 0

    def advance(self, amount: int, **fields: float | str) -> None:
        """Count `amount` tokens more that have gone through the layer once; `fields` as in `Progress.advance`."""
        before, self._done = self._done // self._passes, self._done + amount
        self._progress.advance(self._done // self._passes - before, **fields)


class LayerChange(Protocol):
    """The change that is made to every layer of the student."""

    def passes(self, course: Course) -> int:
        """Return how often the whole text goes through the student's layer, for the progress."""

    def __call__(
        self,
        course: Course,
        hidden: Tensor,
        target: Target,
        folder: Path,
        before: Path | None,
        progress: LayerProgress,
        /,
    ) -> None:
        """Change a layer: `hidden` [rows, seq, hidden] comes as its input and is then its output, without the norm that may follow.

        Writes the changed tensors to `folder` / CHANGED, beside whatever the next layer's change reads: `before` is the folder of
        the layer before, None for the first one. Of several ranks the first writes, and each has rows of its own in `hidden`. Advances `progress` by the text's tokens once for each of the passes.
        """


class SideBySide:
    """The walk: every layer of the student is changed, on its own stream, towards the teacher's.

    projection: returns for one of the teacher's blocks the map from the stream after it to the student's target (`Projection.after`).
    job: the ranks that walk together, each on rows of its own, which both streams have.
    """

    def __init__(
        self,
        student: Stream,
        teacher: Stream,
        kept_layers: Sequence[int],
        projection: Callable[[Block], Callable[[Tensor], Tensor]],
        job: AnyJob,
    ) -> None:
        self._student, self._teacher, self._projection, self._job = student, teacher, projection, job
        self._tokens = math.prod(student.shape[:2])
        self._courses = pair_courses(student.steps, teacher.steps, kept_layers)

    def run(self, change: LayerChange, folder: Path, title: str) -> list[Path]:
        """Change every layer; return the files with the changed tensors of each. What is finished in `folder` already is kept."""

        def take(number: int, before: Path | None, after: Path, progress: Progress) -> None:
            course = self._courses[number]
            of_layer = LayerProgress(progress, len(course.teacher) + change.passes(course))
            self._take(course, change, before, after, of_layer)

        with torch.no_grad():
            finished = walk_layers(
                folder,
                len(self._courses),
                take,
                job=self._job,
                tokens=self._tokens,
                title=title,
                hidden_states=(STUDENT, TEACHER),
            )
        return [path / CHANGED for path in finished]

    def _take(
        self, course: Course, change: LayerChange, before: Path | None, after: Path, progress: LayerProgress
    ) -> None:
        """Take both streams through one step of the student, from the folder of the step before, if any, to this one's."""
        theirs = self._begin(self._teacher, before, after, TEACHER)
        for step in course.teacher:
            with self._teacher.weights_of(step):
                is_last = step is course.teacher[-1]  # the target is the stream before the norm
                self._teacher.advance(step, theirs, progress.advance, with_norm=not is_last)
        ours = self._begin(self._student, before, after, STUDENT)
        change(course, ours, Target(theirs, self._projection(course.teacher_block)), after, before, progress)
        self._student.apply_norm(course.student, ours)
        self._teacher.apply_norm(course.teacher[-1], theirs)
        self._student.flush(after / STUDENT)
        self._teacher.flush(after / TEACHER)

    def _begin(self, stream: Stream, before: Path | None, after: Path, name: str) -> Tensor:
        """Return what goes into a step, in the file where its output will be."""
        hidden = stream.create(after / name)
        if before is None:
            return stream.embed(hidden)
        states = stream.open(before / name, into=hidden)
        return hidden if states is hidden else hidden.copy_(states)
