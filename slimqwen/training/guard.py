"""The guard against bad steps: it detects them, and keeps a record of the rows left out because of them."""

import math
from collections import deque
from statistics import median

from pydantic import BaseModel, ConfigDict

WINDOW = 64  # the most recent losses that a loss is compared with
FEWEST = 16  # with fewer losses to compare with, none is called a spike


class Rollback(BaseModel):
    """Return to the state before `step`, leaving out `rows` rows: those of the steps from `step` to `bad_step`, included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    bad_step: int
    rows: int
    problem: str


class GuardRecord(BaseModel):
    """Guard's part of a saved state, with which a resumed run decides as an uninterrupted one would."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    losses: list[float] = []
    skipped_in_a_row: int = 0
    rollbacks: list[Rollback] = []


class Guard:
    """Detector of bad steps, consulted before the optimiser's update.

    A step is bad if its loss or its gradient's norm is not finite; with a `spike_factor` also if its loss is more than
    spike_factor x the median loss of the last 64 steps that were not bad, of which there must be at least 16. The decision
    is by numbers that are the same on every rank and are saved in full precision.
    """

    def __init__(self, spike_factor: float | None) -> None:
        self.spike_factor = spike_factor
        self.restore(GuardRecord())

    def restore(self, record: GuardRecord) -> None:
        """Continue from the record in a saved state."""
        self.losses = deque(record.losses, maxlen=WINDOW)
        self.skipped_in_a_row = record.skipped_in_a_row
        self.rollbacks = list(record.rollbacks)

    def record(self) -> GuardRecord:
        """Return the record for a state that is saved now."""
        return GuardRecord(
            losses=list(self.losses), skipped_in_a_row=self.skipped_in_a_row, rollbacks=list(self.rollbacks)
        )

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """Return what is wrong with a step, as a clause; None if nothing is."""
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
        """Record the loss of a step whose update was made."""
        self.losses.append(loss)
        self.skipped_in_a_row = 0

    def rows_left_out(self, step: int) -> int:
        """Return how many rows rollbacks have left out before `step`: its own rows come that many later in the training order."""
        return sum(rollback.rows for rollback in self.rollbacks if rollback.step <= step)

    def log_entry(self, step: int) -> dict[str, list[dict[str, object]]]:
        """Return what metrics.jsonl gets at a step that training went back to: its rollbacks."""
        here = [rollback.model_dump(exclude={"step"}) for rollback in self.rollbacks if rollback.step == step]
        return {"rollbacks": here} if here else {}
