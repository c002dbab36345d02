"""The search for the layers to leave out: round after round one more, beside contiguous runs."""

from collections.abc import Collection, Sequence
from typing import Protocol

from slimqwen.core.errors import UserError
from slimqwen.planning.depth import least_influential
from slimqwen.planning.measured_depth import Dropped, MeasuredDrop

REFITTED = 3  # of the last round's sets, beside what has the least block influence


class Measure(Protocol):
    """Measures what leaving layers out does (`LayerDrops`)."""

    def measure(self, sets: Sequence[Dropped], name: str) -> list[MeasuredDrop]:
        """Return the KL of each set, in the order of `sets`; name: of the round, for the progress."""


class Search:
    """Choice of the sets of layers to leave out and measure: `count` of them in the end, one of `attention` always staying.

    at_once: layers that go in each round, neighbours among those that are left; divides `count`. What alternates in a
    period of so many layers still does afterwards.
    """

    def __init__(
        self, influence: Sequence[float], count: int, shortlist: int, attention: Collection[int], at_once: int = 1
    ) -> None:
        self._influence, self._count, self._shortlist, self._at_once = influence, count, shortlist, at_once
        self._attention = set(attention)
        if not self.grow(()):  # every run of neighbours has the last layer of full attention
            self._at_once = 1

    def run(self, drops: Measure) -> list[MeasuredDrop]:
        """Measure round after round; return all that was measured."""
        found: list[MeasuredDrop] = []
        best: Dropped = ()
        rounds = self._count // self._at_once
        for number in range(1, rounds + 1):
            sets = self.grow(best)
            if not sets:
                raise UserError(
                    f"no {self._count} of {len(self._influence)} layers can be left out: one of full attention has to stay; keep more layers."
                )
            if number == rounds:
                sets = list(dict.fromkeys([*sets, *self.contiguous_runs(), *self._least_influential()]))
            measured = drops.measure(sets, f"round {number} of {rounds}")
            found += measured
            grown = [drop for drop in measured if set(drop.dropped) > set(best)] or measured
            best = min(grown, key=lambda drop: (drop.kl, drop.dropped)).dropped
        return found

    def finalists(self, found: Sequence[MeasuredDrop]) -> list[MeasuredDrop]:
        """Return the best of the last round, and the layers with the least influence where they were measured in it."""
        last = sorted(
            (drop for drop in found if len(drop.dropped) == self._count), key=lambda drop: (drop.kl, drop.dropped)
        )
        return last[:REFITTED] + [drop for drop in last[REFITTED:] if drop.dropped in self._least_influential()]

    def grow(self, dropped: Dropped) -> list[Dropped]:
        """Return what is left out so far with one more layer, or as many as go at once: the sets with the least influence."""
        left = [layer for layer in range(len(self._influence)) if layer not in dropped]
        groups = [left[start : start + self._at_once] for start in range(len(left) - self._at_once + 1)]
        groups.sort(key=lambda group: sum(self._influence[layer] for layer in group))
        sets = [tuple(sorted((*dropped, *group))) for group in groups]
        return [drop for drop in sets if self._runs_without(drop)][: self._shortlist]

    def _least_influential(self) -> list[Dropped]:
        """Return the layers with the least influence, wherever they lie; no set where whole periods go."""
        if self._at_once > 1:
            return []
        return [least_influential(self._influence, self._count, self._attention)]

    def contiguous_runs(self) -> list[Dropped]:
        """Return the contiguous runs with the least influence, summed."""
        starts = range(len(self._influence) - self._count + 1)
        runs = [tuple(range(start, start + self._count)) for start in starts]
        runs.sort(key=lambda run: sum(self._influence[layer] for layer in run))
        return [run for run in runs if self._runs_without(run)][: max(1, self._shortlist // 2)]

    def _runs_without(self, dropped: Dropped) -> bool:
        """Return whether a layer of full attention is left, without which the stack does not run (docs/formats.md, section 2)."""
        return not self._attention or bool(self._attention - set(dropped))
