"""What remains of a tensor when units of its axes are kept, permuted or dropped."""

from collections.abc import Mapping

import torch

from slimqwen.families.axes import Axis, Cat, Each, Read, Sizes, Stack, Term, axes_of, size

Kept = Mapping[Axis, torch.Tensor]
"""Axis -> kept unit indices, `[k]`; or `[units of the enclosing axis, k]` where each enclosing unit keeps its own."""


def kept_indices(term: Term, sizes: Sizes, kept: Kept, unit: int | None = None) -> torch.Tensor | None:
    """Return the indices along a dimension that remain, in their new order, `[k]` int64; None where all remain in place.

    `unit` is the enclosing unit (the expert that owns this tensor, or the head around this term), for axes that keep
    a different set in each.
    """
    if not any(axis in kept for axis in axes_of(term)):
        return None
    match term:
        case Axis() | Stack() | Read():
            axis = term if isinstance(term, Axis) else term.axis
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


def select(
    tensor: torch.Tensor, dims: tuple[Term, ...], sizes: Sizes, kept: Kept, unit: int | None = None
) -> torch.Tensor:
    """Return the part of `tensor` that remains: `index_select` per dimension, the same tensor where nothing was cut."""
    for dim, term in enumerate(dims):
        chosen = kept_indices(term, sizes, kept, unit)
        if chosen is not None:
            tensor = tensor.index_select(dim, chosen.to(tensor.device))
    return tensor
