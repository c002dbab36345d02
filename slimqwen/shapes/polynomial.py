"""Symbolic sizes: counting with them gives the formula of a count instead of its value."""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Polynomial:
    """A polynomial in axis sizes with integer coefficients: monomial (axis names, sorted) -> coefficient.

    `families.count` and `shapes.footprint` only add and multiply sizes, so they accept polynomials as well as numbers.
    """

    terms: tuple[tuple[tuple[str, ...], int], ...]

    @classmethod
    def unknown(cls, name: str) -> "Polynomial":
        """Return the polynomial of one unknown size."""
        return cls((((name,), 1),))

    @classmethod
    def of(cls, value: "int | Polynomial") -> "Polynomial":
        """Convert a number; a polynomial is returned unchanged."""
        if isinstance(value, Polynomial):
            return value
        return cls((((), value),) if value else ())

    def __add__(self, other: "int | Polynomial") -> "Polynomial":
        total = Counter(dict(self.terms))
        for monomial, coefficient in Polynomial.of(other).terms:
            total[monomial] += coefficient
        return Polynomial(tuple(sorted(total.items())))

    __radd__ = __add__

    def __mul__(self, other: "int | Polynomial") -> "Polynomial":
        total: Counter[tuple[str, ...]] = Counter()
        for mine, a in self.terms:
            for theirs, b in Polynomial.of(other).terms:
                total[tuple(sorted(mine + theirs))] += a * b
        return Polynomial(tuple(sorted(total.items())))

    __rmul__ = __mul__
