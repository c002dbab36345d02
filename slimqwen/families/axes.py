"""The little language in which a model family writes down the shape of its tensors.

A tensor dimension is a *term*: an axis, a fixed size, a concatenation of terms, or a term repeated for each unit
of an axis. The size of a dimension (`size`), and the indices that remain of it when units of an axis are kept, permuted
or dropped (`slicing.kept_indices`), are the same short recursion over the term; no algorithm does index arithmetic of
its own.

    HIDDEN, KEY_HEAD, KEY_DIM = Axis("hidden"), Axis("key_head"), Axis("key_dim")
    cat(q=each(KEY_HEAD, KEY_DIM), k=each(KEY_HEAD, KEY_DIM))

With 2 key heads of 3 dims this dimension has 12 rows, `q00 q01 q02 q10 q11 q12 k00 .. k12`; keeping key head 1 alone
leaves rows 3, 4, 5 and 9, 10, 11.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Scope = Literal["model", "block", "expert"]


@dataclass(frozen=True)
class Axis:
    """A direction in which a model can shrink.

    `scope` is how many index sets there are: one for the whole model (the residual stream), one per block (the
    experts or heads of a layer), or one per expert (its neurons).
    """

    name: str
    scope: Scope = "model"


@dataclass(frozen=True)
class Cat:
    """Terms one after another; the names are for the reader and for splitting."""

    parts: tuple[tuple[str, "Term"], ...]


@dataclass(frozen=True)
class Each:
    """`term` repeated for each unit of `axis`, units outermost."""

    axis: Axis
    term: "Term"


@dataclass(frozen=True)
class Stack:
    """A dimension of whole units lying on top of one another (fused experts).

    Where an ordinary axis can only be selected from, stacked units are tensors of their own: they can be merged.
    """

    axis: Axis


@dataclass(frozen=True)
class Read:
    """An axis as a norm hands it on: a matrix with such columns multiplies the norm's output, gain included.

    `norm` is the norm's tensor, below the matrix' own block or, where that has no such norm, by its full name. Without a
    norm in between an axis is written, or looked up.
    """

    axis: Axis
    norm: str


Term = Axis | int | Cat | Each | Stack | Read
Sizes = Mapping[Axis, int]


def cat(**parts: Term) -> Cat:
    return Cat(tuple(parts.items()))


def each(axis: Axis, term: Term) -> Each:
    return Each(axis, term)


def size(term: Term, sizes: Sizes) -> int:
    """Return the number of indices that `term` spans."""
    match term:
        case int():
            return term
        case Axis():
            return sizes[term]
        case Stack(axis) | Read(axis):
            return sizes[axis]
        case Cat(parts):
            return sum(size(part, sizes) for _, part in parts)
        case Each(axis, inner):
            return sizes[axis] * size(inner, sizes)


def axes_of(term: Term) -> set[Axis]:
    """Return every axis that a term mentions."""
    match term:
        case int():
            return set()
        case Axis():
            return {term}
        case Stack(axis) | Read(axis):
            return {axis}
        case Cat(parts):
            return set().union(*(axes_of(part) for _, part in parts))
        case Each(axis, inner):
            return {axis} | axes_of(inner)


def nest(term: Term) -> tuple[Axis, ...]:
    """Return the axes of a term that is units within units, outermost first.

    Of each(KV_HEAD, each(QUERY_HEAD, HEAD_DIM)) they are (KV_HEAD, QUERY_HEAD, HEAD_DIM), and an index along it counts up as in a tensor of
    that shape.
    """
    match term:
        case Axis():
            return (term,)
        case Each(axis, inner):
            return (axis, *nest(inner))
    raise AssertionError(f"not units within units: {term}")
