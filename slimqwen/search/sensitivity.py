"""The cost of cutting one axis alone, and the prediction from it for shapes that are cut along several."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimqwen.core.errors import UserError
from slimqwen.families.count import Counts, count
from slimqwen.recipe import Target
from slimqwen.shapes.fit import SEARCHED, Feasible
from slimqwen.shapes.target import completed, target_config

Array = NDArray[Any]


@dataclass(frozen=True)
class Curve:
    """Damage by the size that one axis is cut to: `damages` at rising `sizes`, the last being the source's, with damage 0."""

    sizes: list[int]
    damages: list[float]

    @classmethod
    def through(cls, source: int, measured: Mapping[int, float]) -> "Curve":
        """Return the curve through measurements, size -> damage; at the size `source` nothing is cut."""
        points = sorted({**measured, source: 0.0}.items())
        return cls([size for size, _ in points], [damage for _, damage in points])

    def at(self, sizes: Array) -> Array:
        """Interpolate damages at `sizes` [n], float64 [n]: the square root is linear between two measured sizes.

        The KL of a small cut grows with the square of what is cut. From a measured size towards the source's, this was right
        within 40 % for experts, neurons and top-k, where linear interpolation was up to 4 times too high (docs/search.md).

        Curve([4, 8, 16], [4.0, 1.0, 0.0]).at([6, 12]) is [2.25, 0.25].
        """
        roots = np.sqrt(
            np.maximum(self.damages, 0.0)
        )  # measured relative to the base, a damage can be slightly below 0
        damages: Array = np.interp(sizes, self.sizes, roots) ** 2
        return damages


def predicted(shapes: Array, curves: Mapping[str, Curve], base: float) -> Array:
    """Predict the KL of shapes [n, SEARCHED], [n]: `base` plus the damage of each axis, as if it were cut alone."""
    total = np.full(len(shapes), base)
    for column, field in enumerate(SEARCHED):
        if field in curves:
            total += curves[field].at(shapes[:, column])
    return total


def spread(sizes: list[int], number: int) -> list[int]:
    """Return `number` of the rising `sizes`, evenly spaced, with the first and the last; all where there are no more.

    spread([1, 2, 3, 4, 5, 6, 7], 3) is [1, 4, 7].
    """
    if len(sizes) <= number:
        return sizes
    return [sizes[round(place)] for place in np.linspace(0, len(sizes) - 1, number)]


def agreeing_pairs(left: list[float], right: list[float]) -> tuple[int, int]:
    """Return how many pairs both lists put in the same order, and how many pairs there are."""
    pairs = list(combinations(zip(left, right, strict=True), 2))
    return sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs), len(pairs)


class Axes:
    """Cuts of one axis alone, at sizes of the feasible shapes.

    base: the sizes that are not searched, the same in every shape (pinned heads, say). A cut alone is a cut of the base.
    """

    def __init__(self, found: Feasible) -> None:
        self._found = found
        unsearched = found.pinned.model_dump(exclude_none=True, exclude=set(SEARCHED))
        self.base = Target(**unsearched)
        self.base_counts = self._counts(self.base)

    def alone(self, field: str, size: int) -> Target:
        """Return the target that cuts `field` alone, and the top-k only where fewer experts than that remain."""
        target = self.base.model_copy(update={field: size})
        if field == "num_experts" and size < self._found.config["num_experts_per_tok"]:
            target = target.model_copy(update={"num_experts_per_tok": size})
        return target

    def cuts(self, sizes_per_axis: int) -> list[tuple[str, int, Counts]]:
        """Return (axis, size, counts left) for up to `sizes_per_axis` sizes of every axis that a feasible shape cuts.

        The sizes occur among the shapes, and include the smallest and the largest.
        """
        chosen = []
        for column, field in enumerate(SEARCHED):
            occurring = np.unique(self._found.shapes[:, column]).tolist()
            possible = {
                size: counts
                for size in occurring
                if size < self._found.config[field] and (counts := self._counts_if_allowed(self.alone(field, size)))
            }
            chosen += [(field, size, possible[size]) for size in spread(list(possible), sizes_per_axis)]
        return chosen

    def _counts(self, target: Target) -> Counts:
        """Count the parameters of the source cut to `target`."""
        found = self._found
        return count(
            found.family, target_config(found.family, found.config, completed(found.family, target, found.config))
        )

    def _counts_if_allowed(self, target: Target) -> Counts | None:
        """Count as `_counts`; None where the family does not allow the size with the source's others."""
        try:
            return self._counts(target)
        except UserError:
            return None
