"""Formatting of numbers, and the cells of sortable tables."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A cell of a table. value: the sort key, None where nothing was measured. change: relative to the first row."""

    text: str
    value: float | None = None
    change: str = ""


NOTHING = Cell("–")


def number(value: float | None, digits: int) -> Cell:
    """Make a cell of a number with so many decimals."""
    return NOTHING if value is None else Cell(f"{value:,.{digits}f}", value)


def share(value: float | None) -> Cell:
    """Make a cell of a share, in percent."""
    return NOTHING if value is None else Cell(percent(value), value)


def percent(fraction: float) -> str:
    """Format a fraction with two digits: `34 %`, `3.4 %`."""
    return f"{100 * fraction:.0f}\u00a0%" if fraction >= 0.0995 or fraction == 0 else f"{100 * fraction:.1f}\u00a0%"


def amount(parameters: int) -> str:
    """Format a number with three digits and a unit: `4.70 M`, `79.7 B`."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if parameters >= size:
            value = parameters / size
            return f"{value:.{max(0, 2 - (value >= 10) - (value >= 100))}f}\u00a0{unit}"
    return str(parameters)
