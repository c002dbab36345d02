"""The little language in which a model family writes down the shape of its tensors.

A tensor dimension is a *term*: an axis, a fixed size, a concatenation of terms, or a term repeated for each unit
of an axis. The size of a dimension, and the indices that remain of it when units of an axis are kept, permuted or
dropped, are the same short recursion over the term; no algorithm does index arithmetic of its own.

    HIDDEN, KEY_HEAD, KEY_DIM = Axis("hidden"), Axis("key_head"), Axis("key_dim")
    cat(q=each(KEY_HEAD, KEY_DIM), k=each(KEY_HEAD, KEY_DIM))

With 2 key heads of 3 dims this dimension has 12 rows, `q00 q01 q02 q10 q11 q12 k00 .. k12`; keeping key head 1 alone
leaves rows 3, 4, 5 and 9, 10, 11.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Scope = Literal["model", "block", "expert"]


@dataclass(frozen=True)
class Axis:
    """A direction in which a model can shrink.

    `scope` says how many index sets there are: one for the whole model (the residual stream), one per block (the
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


Term = Axis | int | Cat | Each | Stack
Sizes = Mapping[Axis, int]
Kept = Mapping[Axis, torch.Tensor]
"""Axis -> kept unit indices, `[k]`; or `[units of the enclosing axis, k]` where each enclosing unit keeps its own."""


def cat(**parts: Term) -> Cat:
    return Cat(tuple(parts.items()))


def each(axis: Axis, term: Term) -> Each:
    return Each(axis, term)


def size(term: Term, sizes: Sizes) -> int:
    """Number of indices that `term` spans."""
    match term:
        case int():
            return term
        case Axis():
            return sizes[term]
        case Stack(axis):
            return sizes[axis]
        case Cat(parts):
            return sum(size(part, sizes) for _, part in parts)
        case Each(axis, inner):
            return sizes[axis] * size(inner, sizes)


def kept_indices(term: Term, sizes: Sizes, kept: Kept, unit: int | None = None) -> torch.Tensor | None:
    """Indices along a dimension that remain, in their new order, `[k]` int64; None where all remain in place.

    `unit` is the enclosing unit (the expert that owns this tensor, or the head around this term), for axes that keep
    a different set in each.
    """
    if not any(axis in kept for axis in axes_of(term)):
        return None
    match term:
        case Axis() | Stack(_):
            axis = term.axis if isinstance(term, Stack) else term
            chosen = kept[axis]
            if chosen.dim() == 2:
                assert unit is not None, f"axis {axis.name} keeps a set per enclosing unit, and there is none here"
                return chosen[unit]
            return chosen
        case Cat(parts):
            pieces, offset = [], 0
            for _, part in parts:
                pieces.append(offset + _indices(part, sizes, kept, unit))
                offset += size(part, sizes)
            return torch.cat(pieces)
        case Each(axis, inner):
            stride = size(inner, sizes)
            units = _indices(axis, sizes, kept, unit)
            return torch.cat([u * stride + _indices(inner, sizes, kept, u) for u in units.tolist()])
    raise AssertionError(f"not a term: {term}")


def _indices(term: Term, sizes: Sizes, kept: Kept, unit: int | None) -> torch.Tensor:
    chosen = kept_indices(term, sizes, kept, unit)
    return torch.arange(size(term, sizes)) if chosen is None else chosen


def axes_of(term: Term) -> set[Axis]:
    """Every axis that a term mentions."""
    match term:
        case int():
            return set()
        case Axis():
            return {term}
        case Stack(axis):
            return {axis}
        case Cat(parts):
            return set().union(*(axes_of(part) for _, part in parts))
        case Each(axis, inner):
            return {axis} | axes_of(inner)


def select(tensor: torch.Tensor, dims: tuple[Term, ...], sizes: Sizes, kept: Kept, unit: int | None = None) -> torch.Tensor:
    """The part of `tensor` that remains: `index_select` per dimension, the same tensor where nothing was cut."""
    for dim, term in enumerate(dims):
        chosen = kept_indices(term, sizes, kept, unit)
        if chosen is not None:
            tensor = tensor.index_select(dim, chosen.to(tensor.device))
    return tensor
