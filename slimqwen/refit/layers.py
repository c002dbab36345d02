"""The refit of one layer: what its networks should add to the student's stream, and their matrices solved for it."""

import math
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from slimqwen.layerwise.courses import Course
from slimqwen.layerwise.side_by_side import CHANGED, LayerProgress, Target
from slimqwen.layerwise.stream import Stream
from slimqwen.parallel.job import Job
from slimqwen.refit.matrices import Network, agreement, refit, squared_norm, subtract_outputs, take_share, trusted_share
from slimqwen.refit.outputs import matrices_of, output_specs
from slimqwen.refit.record import record_networks

# Measured on the built-in teacher, 32 -> 16 experts (docs/refit.md).
RIDGE = 1e-2
SWEEPS = 2
UNCHANGED = 1e-3  # of what a layer's networks should add: less that is missing is rounding, and the layer stays

# Files in the folder of the layer under way:
SCRATCH = "scratch"  # a copy of what is to be explained
INPUTS = "inputs"  # of the networks of the layer under way


class Refit:
    """Refits the networks of a layer whose output is not the teacher's.

    job: the ranks, each with rows of its own in `student` and in what follows; all solve for the same matrices, and the first
    writes them. folds: what is left out, bool [rows], to measure how far to take a refit on text that it was not fitted on
    (`matrices.trusted_share`). unseen: rows that nothing is fitted on and no fold has, bool [rows], to measure the result on.
    """

    def __init__(self, student: Stream, job: Job, folds: Sequence[Tensor] = (), unseen: Tensor | None = None) -> None:
        self._student, self._job = student, job
        self._folds = [left_out.repeat_interleave(student.shape[1]) for left_out in folds]
        self._seen = None if unseen is None else ~unseen.repeat_interleave(student.shape[1])
        self._tokens = math.prod(student.shape[:2])

    def passes(self, _course: Course) -> int:
        """Return how often: by the layer, and by its networks in each sweep and for each fold."""
        return 1 + SWEEPS + len(self._folds)

    def __call__(
        self,
        course: Course,
        hidden: Tensor,
        target: Target,
        folder: Path,
        before: Path | None,
        progress: LayerProgress,
    ) -> None:
        """Refit a layer (`LayerChange`): `hidden` is the stream before it, then the residual, at last the stream after it."""
        with self._student.weights_of(course.student):
            self._refit(course, hidden, target, folder, progress)

    def _refit(self, course: Course, hidden: Tensor, target: Target, folder: Path, progress: LayerProgress) -> None:
        def subtract_from_target(rows: slice) -> None:
            hidden[rows] = target[rows] - hidden[rows]

        outputs = output_specs(self._student.checkpoint, course.block)
        stored = {spec.name: self._student.checkpoint.read(spec.name).clone() for spec in outputs}
        networks = record_networks(self._student, course.student, outputs, hidden, folder / INPUTS, progress)
        for rows in self._student.passes():
            subtract_from_target(rows)  # what the networks should add is left
        error = self._refit_networks(networks, matrices_of(stored.values()), hidden, folder, progress)
        progress.advance(0, block=course.block.name, error=error)
        for rows in self._student.passes():
            subtract_from_target(rows)
        if self._job.is_first:
            save_file(stored, folder / CHANGED)
        self._student.remove(folder / INPUTS)

    def _refit_networks(
        self,
        networks: Sequence[Network],
        matrices: Sequence[Tensor],
        target: Tensor,
        folder: Path,
        progress: LayerProgress,
    ) -> str:
        """Change `matrices`; the file-backed target becomes what they leave of it. Return the share missing, before and after."""
        target, start = target.flatten(0, 1), [matrix.clone() for matrix in matrices]
        scratch = self._student.create(folder / SCRATCH).flatten(0, 1).copy_(target)
        total = self._job.total
        wanted = squared_norm(target, total=total)
        subtract_outputs(networks, matrices, scratch)
        missing = squared_norm(scratch, total=total)
        if missing <= UNCHANGED**2 * wanted:
            target.copy_(scratch)
            self._student.remove(folder / SCRATCH)
            progress.advance(self._tokens * (SWEEPS + len(self._folds)))
            return "0, left as it is"
        seen = networks if self._seen is None else [network.on(self._seen) for network in networks]
        agreements = []
        for left_out in self._folds:
            agreements.append(
                agreement(seen, matrices, target, scratch, left_out, ridge=RIDGE, sweeps=SWEEPS, total=total)
            )
            progress.advance(self._tokens)
        residual = target if self._seen is None else scratch.copy_(target)
        for sweep, _ in enumerate(refit(seen, matrices, residual, ridge=RIDGE, sweeps=SWEEPS, total=total)):
            progress.advance(self._tokens if sweep else 0)
        share = trusted_share(agreements)
        if share < 1:
            take_share(seen, matrices, start, residual, share)
        if residual is scratch:
            subtract_outputs(networks, matrices, target)
        self._student.remove(folder / SCRATCH)
        left = squared_norm(target, total=total)
        before, after = (math.sqrt(error / wanted) if wanted else 0.0 for error in (missing, left))
        return f"{before:.3f} to {after:.3f}" + (f" ({share:.2f} of the refit)" if share < 1 else "")
