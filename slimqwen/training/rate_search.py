"""Line search for a learning rate over powers of a factor: which to try next, and where between them the best one lies."""

from collections.abc import Mapping
from math import inf, isfinite

FACTOR = 2.0  # between neighbouring rates


def next_exponent(values: Mapping[int, float], most: int) -> int | None:
    """Return the next rate to try, as a power of FACTOR times the first; None where there is nothing more to try.

    values: exponent -> what was measured, infinite where the fork diverged. The search goes downhill, a factor at a time, until
    both neighbours of the best have been tried, or `most` rates in all.
    """
    if not values:
        return 0
    if len(values) == most:
        return None
    best = min(values, key=lambda exponent: (values[exponent], exponent))
    if not isfinite(values[best]):
        return min(values) - 1
    return next((exponent for exponent in (best - 1, best + 1) if exponent not in values), None)


def lowest_point(values: Mapping[int, float]) -> float | None:
    """Return where the parabola through the best and its neighbours is lowest, an exponent; the best itself at the edge.

    None where no value is finite.
    """
    best = min(values, key=lambda exponent: (values[exponent], exponent))
    if not isfinite(values[best]):
        return None
    lower, upper = values.get(best - 1, inf), values.get(best + 1, inf)
    if not (isfinite(lower) and isfinite(upper)):
        return float(best)
    curvature = lower - 2 * values[best] + upper
    return best + (lower - upper) / (2 * curvature) if curvature > 0 else float(best)
