"""The guard of the training: which steps are bad, and which rows were left out because of them."""

import math
from collections import deque
from statistics import median

from pydantic import BaseModel, ConfigDict

WINDOW = 64  # losses that a loss is compared with
FEWEST = 16  # losses to compare with before any loss is called a spike


class Rollback(BaseModel):
    """A return to the state before `step`. It left out `rows` rows, those of `step` up to and including `bad_step`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    bad_step: int
    rows: int
    problem: str


class GuardRecord(BaseModel):
    """What a saved state keeps of the guard, so that a resumed run decides as an uninterrupted one would."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    losses: list[float] = []
    skipped_in_a_row: int = 0
    rollbacks: list[Rollback] = []


class Guard:
    """Says whether a step is bad, before the optimiser moves.

    A step is bad if its loss or its gradient's norm is not finite; with a `spike_factor` also if its loss is more than
    spike_factor x the median of the losses before it: of the last 64 steps that were taken, bad ones left out, and of
    at least 16. It decides by numbers that are the same on every rank, and that the state keeps in full precision.
    """

    def __init__(self, spike_factor: float | None) -> None:
        self.spike_factor = spike_factor
        self.restore(GuardRecord())

    def restore(self, record: GuardRecord) -> None:
        """Take up what a saved state kept."""
        self.losses = deque(record.losses, maxlen=WINDOW)
        self.skipped_in_a_row = record.skipped_in_a_row
        self.rollbacks = list(record.rollbacks)

    def record(self) -> GuardRecord:
        """What a state saved now must keep."""
        return GuardRecord(
            losses=list(self.losses), skipped_in_a_row=self.skipped_in_a_row, rollbacks=list(self.rollbacks)
        )

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, in words; None if nothing is."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss:g}, gradient norm {grad_norm:g}"
        if self.spike_factor is None or len(self.losses) < FEWEST:
            return None
        usual = median(self.losses)
        if loss <= self.spike_factor * usual:
            return None
        return (
            f"loss {loss:g} is more than {self.spike_factor:g} x {usual:g}, the median of the last {len(self.losses)}"
        )

    def accept(self, loss: float) -> None:
        """The optimiser has moved by a step of this loss."""
        self.losses.append(loss)
        self.skipped_in_a_row = 0

    def rows_left_out(self, step: int) -> int:
        """Rows that rollbacks have left out before `step`: its own come as many later in the training order."""
        return sum(rollback.rows for rollback in self.rollbacks if rollback.step <= step)

    def logged(self, step: int) -> dict[str, list[dict[str, object]]]:
        """What metrics.jsonl says at a step that training went back to."""
        here = [rollback.model_dump(exclude={"step"}) for rollback in self.rollbacks if rollback.step == step]
        return {"rollbacks": here} if here else {}
