"""Which decoder layers stay (method.md section 2)."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from slimqwen.core.errors import UserError
from slimqwen.core.registry import Registry
from slimqwen.recipe import DepthCriterion

if TYPE_CHECKING:
    from torch import Tensor

    from slimqwen.planning.measured_depth import MeasuredDepth

DROPPED: Registry[DepthCriterion, Callable[..., Iterable[int]]] = Registry(DepthCriterion)
"""The layers that go, by each criterion. Parameters are named after what `kept_layers` has: `keep`, `num_layers` and its keywords."""


def kept_layers(
    criterion: DepthCriterion,
    num_layers: int,
    keep: int,
    *,
    similarity: "Tensor | None" = None,
    block_influence: "Tensor | None" = None,
    measured: "MeasuredDepth | None" = None,
    refitted: bool = False,
    must_keep_one_of: Collection[int] | None = None,
) -> list[int]:
    """Return the `keep` of `num_layers` layers that stay, in ascending order.

    similarity, block_influence: `[layers]`, scores. measured: what leaving layers out does; refitted: whether what is left will be.

    On a tie the later layer (or run) goes. `must_keep_one_of` are the full-attention layers: a stack without any
    does not run (formats.md section 2), so one of them must stay. A criterion that names a run can't be mended without
    becoming another criterion: `UserError`.
    """
    assert 1 <= keep <= num_layers
    if keep == num_layers:
        return list(range(num_layers))
    given = {
        "num_layers": num_layers,
        "keep": keep,
        "similarity": similarity,
        "block_influence": block_influence,
        "measured": measured,
        "refitted": refitted,
        "must_keep_one_of": must_keep_one_of or (),
    }
    dropped = sorted(DROPPED.compute(criterion, given.__getitem__))
    kept = [layer for layer in range(num_layers) if layer not in dropped]
    if must_keep_one_of and not set(must_keep_one_of) & set(kept):
        is_run = dropped == list(range(dropped[0], dropped[-1] + 1))
        which = f"{dropped[0]} to {dropped[-1]}" if is_run else ", ".join(map(str, dropped))
        raise UserError(
            f"pruning.depth '{criterion}' to num_hidden_layers {keep} drops layers {which} and with them "
            f"every full-attention layer ({', '.join(map(str, sorted(must_keep_one_of)))}), of which one must stay: "
            f"keep more layers, or use '{DepthCriterion.BLOCK_INFLUENCE}', which always keeps one."
        )
    return kept


@DROPPED.entry(DepthCriterion.LAST)
def last_layers(num_layers: int, keep: int) -> Iterable[int]:
    """Return the last layers, whatever they do."""
    return range(keep, num_layers)


@DROPPED.entry(DepthCriterion.SIMILARITY)
def most_similar_run(num_layers: int, keep: int, similarity: "Tensor") -> Iterable[int]:
    """Return the run l*..l*+N-1 of N = num_layers - keep layers, l* = argmax of `similarity` `[layers]` over the starts whose run fits."""
    assert len(similarity) == num_layers
    cosines = similarity.tolist()
    start = max(range(keep + 1), key=lambda layer: (cosines[layer], layer))
    return range(start, start + num_layers - keep)


@DROPPED.entry(DepthCriterion.BLOCK_INFLUENCE)
def lowest_block_influence(
    num_layers: int, keep: int, block_influence: "Tensor", must_keep_one_of: Collection[int]
) -> Iterable[int]:
    """Return the layers with the lowest of `block_influence` `[layers]`, as `least_influential` has them."""
    assert len(block_influence) == num_layers
    return least_influential(block_influence.tolist(), num_layers - keep, must_keep_one_of)


@DROPPED.entry(DepthCriterion.MEASURED)
def smallest_measured_kl(num_layers: int, keep: int, measured: "MeasuredDepth", refitted: bool) -> Iterable[int]:
    """Return the layers without which the KL to the whole model is smallest, of what was `measured`."""
    return measured.best(num_layers - keep, refitted=refitted)


def least_influential(influence: Sequence[float], count: int, must_keep_one_of: Collection[int]) -> tuple[int, ...]:
    """Return the `count` layers with the lowest block influence, in ascending order; on a tie the later one.

    Where none of `must_keep_one_of` would stay, the highest-scored of them takes the place of the lowest-scored layer that would.
    """
    ranked = sorted(range(len(influence)), key=lambda layer: -influence[layer])  # stable: the earlier layer wins a tie
    kept = ranked[: len(ranked) - count]
    if must_keep_one_of and not set(must_keep_one_of) & set(kept):
        kept[-1] = next(layer for layer in ranked if layer in must_keep_one_of)
    return tuple(sorted(set(ranked) - set(kept)))
