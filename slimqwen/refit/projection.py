"""The teacher's residual stream in the student's coordinates: all of its channels, some of them, or rotated ones."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.families.family import Block
from slimqwen.planning.plan import Plan
from slimqwen.pruning.planned import planned_residual

SAME_STREAM = 0.02  # largest |student - teacher| / |teacher| of embeddings that differ by rounding alone
COMPARED_EMBEDDINGS = 256


class Projection:
    """What a plan makes of the residual stream.

    plan_file: where the plan lies, beside its basis if the cut was rotated; None for a plan in memory, without a basis.
    """

    def __init__(self, teacher: Checkpoint, plan: Plan, plan_file: Path | None) -> None:
        self._hidden = teacher.family.hidden
        self._residual = planned_residual(teacher, plan, plan_file)
        channels = plan.kept.get(self._hidden.name)
        self._channels = None if channels is None or self._is_rotated else torch.tensor(channels)

    @property
    def _is_rotated(self) -> bool:
        return self._residual is not None and self._residual.is_rotated

    def after(self, block: Block) -> Callable[[Tensor], Tensor]:
        """Return the map from the teacher's stream after one of its blocks, float32 [..., hidden], to the student's, [..., kept]."""
        channels = self._channels
        if self._is_rotated:
            assert self._residual is not None
            matrix = self._residual.matrix(self._hidden, block, "attention", torch.float64).float()
            return lambda stream: stream @ matrix
        return (lambda stream: stream) if channels is None else (lambda stream: stream[..., channels])

    def check(self, student: Checkpoint, teacher: Checkpoint) -> None:
        """Raise UserError where the student's embeddings are not those that the plan leaves: its stream is another."""
        name = next(name for name, spec in teacher.specs.items() if spec.part == "embedding")
        theirs = self.after(teacher.specs[name].block)(_first_rows(teacher, name))
        ours = _first_rows(student, name)
        if ours.shape != theirs.shape or (ours - theirs).norm() > SAME_STREAM * theirs.norm():
            raise UserError(
                f"the embeddings of {student.folder} are not what the plan makes of those of {teacher.folder}: the two "
                "residual streams are compared, so give what `slimqwen prune` made by this plan, before any training of the whole model."
            )


def _first_rows(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.read_slice(name, slice(COMPARED_EMBEDDINGS)).float()
