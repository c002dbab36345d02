"""How numbers are written for people, and the cells of a table that can be sorted by them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """`value` is what a column is sorted by, None where nothing was measured; `change`: beside the first row's."""

    text: str
    value: float | None = None
    change: str = ""


NOTHING = Cell("–")


def number(value: float | None, digits: int) -> Cell:
    return NOTHING if value is None else Cell(f"{value:,.{digits}f}", value)


def share(value: float | None) -> Cell:
    return NOTHING if value is None else Cell(percent(value), value)


def percent(fraction: float) -> str:
    """`34 %`, `3.4 %`: two digits are what a reader compares."""
    return f"{100 * fraction:.0f}\u00a0%" if fraction >= 0.0995 or fraction == 0 else f"{100 * fraction:.1f}\u00a0%"


def amount(parameters: int) -> str:
    """`4.70 M`, `79.7 B`: three digits and a unit."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if parameters >= size:
            value = parameters / size
            return f"{value:.{max(0, 2 - (value >= 10) - (value >= 100))}f}\u00a0{unit}"
    return str(parameters)
