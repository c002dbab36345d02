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
from slimqwen.repair.refit import Network, agreement, refit, squared_norm, subtract_answers, take_share, trusted_share
from slimqwen.repair.stream import Stream

# Measured on the built-in teacher, 32 -> 16 experts (docs/repair.md).
RIDGE = 1e-2
SWEEPS = 2
UNCHANGED = 1e-3  # of what a layer's networks should say: less that is missing is rounding, and the layer stays

# In the folder of each layer that is finished; the hidden states [rows, seq, hidden] in the last finished layer's only:
MATRICES = "matrices.safetensors"  # the refitted tensors by their names in the checkpoint
STUDENT, TEACHER = "student", "teacher"
SCRATCH = "scratch"  # a copy of what is to be explained
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

    def passes(self, folds: int) -> int:
        """How often the whole text is gone through: by each step, and by the networks in each sweep and for each fold."""
        return len(self.teacher) + 1 + SWEEPS + folds


def _layer_of(step: Step) -> Block:
    return next(block for block in step.blocks if block.recall is not None)


def courses(student: Sequence[Step], teacher: Sequence[Step], kept_layers: Sequence[int]) -> list[Course]:
    """Each step of the student with the teacher's steps that it stands for: its own, and dropped ones.

    A layer before a gap stands for the layers in it, so that the next one is asked what it was asked in the teacher, and
    the last one ends where the teacher does.

    Example: kept_layers 0, 1, 3 of 5, and an MTP module: (0; 0), (1; 1, 2), (3; 3, 4), (mtp; mtp).
    """
    mtp = len(student) - len(kept_layers)
    ends = [*kept_layers[1:], len(teacher) - mtp] + [len(teacher)] * mtp
    return [Course(step, teacher[start:end]) for step, start, end in zip(student, [0, *ends[:-1]], ends, strict=True)]


class LayerByLayer:
    """Refits every layer of the student that is not where the teacher is.

    projection: makes the student's targets of the teacher's stream. folds: what is left out, bool [rows], to see how far a refit
    is to be trusted on text that it has not seen (`refit.trusted_share`).
    """

    def __init__(
        self,
        student: Stream,
        teacher: Stream,
        kept_layers: Sequence[int],
        projection: Projection,
        folds: Sequence[Tensor] = (),
    ) -> None:
        self._student, self._teacher, self._projection = student, teacher, projection
        self._folds = [left_out.repeat_interleave(student.shape[1]) for left_out in folds]
        self._tokens = math.prod(student.shape[:2])
        self._courses = courses(student.steps, teacher.steps, kept_layers)

    def run(self, folder: Path, title: str) -> list[Path]:
        """The files with the refitted tensors of each layer. What is finished in `folder` already is kept."""
        finished = [folder / f"{number:03d}" for number in range(len(self._courses))]
        found = next((number for number, path in enumerate(finished) if not path.exists()), len(finished))
        passes = [course.passes(len(self._folds)) for course in self._courses]
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
        said = self._refit_networks(networks, matrices_of(stored.values()), ours, folder, progress)
        progress.advance(0, block=course.block.name, error=said)
        for rows in self._student.passes():
            subtract_from_target(rows)
        save_file(stored, folder / MATRICES)
        (folder / ASKED).unlink()

    def _refit_networks(
        self, networks: Sequence[Network], matrices: Sequence[Tensor], target: Tensor, folder: Path, progress: Progress
    ) -> str:
        """Change `matrices`; the file-backed target becomes what they leave of it. Returns the share missing, before and after."""
        target, start = target.flatten(0, 1), [matrix.clone() for matrix in matrices]
        scratch = self._student.open(folder / SCRATCH).flatten(0, 1).copy_(target)
        wanted = squared_norm(target)
        subtract_answers(networks, matrices, scratch)
        missing = squared_norm(scratch)
        if missing <= UNCHANGED**2 * wanted:
            target.copy_(scratch)
            (folder / SCRATCH).unlink()
            progress.advance(self._tokens * (SWEEPS + len(self._folds)))
            return "0, left as it is"
        agreements = []
        for left_out in self._folds:
            agreements.append(agreement(networks, matrices, target, scratch, left_out, ridge=RIDGE, sweeps=SWEEPS))
            progress.advance(self._tokens)
        (folder / SCRATCH).unlink()
        for sweep, _ in enumerate(refit(networks, matrices, target, ridge=RIDGE, sweeps=SWEEPS)):
            progress.advance(self._tokens if sweep else 0)
        share = trusted_share(agreements)
        if share < 1:
            take_share(networks, matrices, start, target, share)
        before, after = (math.sqrt(error / wanted) if wanted else 0.0 for error in (missing, squared_norm(target)))
        return f"{before:.3f} to {after:.3f}" + (f" ({share:.2f} of the refit)" if share < 1 else "")
