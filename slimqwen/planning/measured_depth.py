"""What `measure-depth` found out and `plan` reads: which layers were left out, and what that did."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from slimqwen.artifacts.json_file import load_model
from slimqwen.core.errors import UserError

Dropped = tuple[int, ...]
"""Layers that are left out, in ascending order."""


class MeasuredDrop(BaseModel):
    """Some layers left out, and what that does: KL(whole model || without them) in nats per token.

    refitted_kl: the same where what is left is refitted, on text that the refit did not see; None where that was not measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dropped: Dropped
    kl: float = Field(ge=0.0)
    refitted_kl: float | None = Field(None, ge=0.0)


class MeasuredDepth(BaseModel):
    """What leaving layers out does to a checkpoint; beside the statistics what `plan` reads for `depth: measured`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["slimqwen.depth/1"] = "slimqwen.depth/1"
    checkpoint: str
    data: str
    tokens: int
    measured: list[MeasuredDrop]

    def best(self, count: int, *, refitted: bool = False) -> Dropped:
        """Return the `count` layers without which the KL is smallest, of what was measured.

        refitted: by the KL after the refit, where that was measured. Raises UserError where nothing of that size was measured.
        """
        found = [drop for drop in self.measured if len(drop.dropped) == count]
        if not found:
            counts = sorted({len(drop.dropped) for drop in self.measured})
            raise UserError(
                f"the target drops {count} layers, and what was measured drops {', '.join(map(str, counts))}: run "
                "`slimqwen measure-depth` with this target."
            )
        after = [(drop.refitted_kl, drop.dropped) for drop in found if drop.refitted_kl is not None]
        return min(after if refitted and after else [(drop.kl, drop.dropped) for drop in found])[1]

    @classmethod
    def load(cls, path: Path) -> "MeasuredDepth":
        """Load a measurement. Raises UserError for a file that is missing or is none."""
        advice = "give a depth.json written by `slimqwen measure-depth`."
        return load_model(path, cls, what="a measurement of slimqwen.depth/1", advice=advice)
