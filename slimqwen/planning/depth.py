"""Which decoder layers stay (method.md section 2)."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from slimqwen.core.errors import UserError
from slimqwen.recipe import DepthCriterion

if TYPE_CHECKING:
    from torch import Tensor

    from slimqwen.planning.measured_depth import MeasuredDepth


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
    """The `keep` of `num_layers` layers that stay, in ascending order. N = num_layers - keep layers go:

    - 'last': the last N.
    - 'similarity': the run l*..l*+N-1 that starts at l* = argmax of `similarity` `[layers]`, over the starts whose run
      fits.
    - 'block_influence': the N lowest of `block_influence` `[layers]`.
    - 'measured': those without which the KL to the whole model is smallest, of what was `measured`; of what was `refitted` after it, if
      what is left will be.

    On a tie the later layer (or run) goes. `must_keep_one_of` are the full-attention layers: a stack without any
    does not run (formats.md section 2), so one of them must stay. Where none would, 'block_influence' keeps the
    highest-scored of them in place of the lowest-scored layer that would have stayed. 'last' and 'similarity' name a
    run that can't be mended without becoming another criterion: `UserError`.
    """
    assert 1 <= keep <= num_layers
    if keep == num_layers:
        return list(range(num_layers))

    if criterion == "measured":
        assert measured is not None
        dropped = measured.best(num_layers - keep, refitted=refitted)
        return [layer for layer in range(num_layers) if layer not in dropped]

    if criterion == "block_influence":
        assert block_influence is not None and len(block_influence) == num_layers
        dropped = least_influential(block_influence.tolist(), num_layers - keep, must_keep_one_of or ())
        return [layer for layer in range(num_layers) if layer not in dropped]

    if criterion == "similarity":
        assert similarity is not None and len(similarity) == num_layers
        cosines = similarity.tolist()
        start = max(range(keep + 1), key=lambda layer: (cosines[layer], layer))
    else:
        start = keep
    run = range(start, start + num_layers - keep)
    kept = [layer for layer in range(num_layers) if layer not in run]
    if must_keep_one_of and not set(must_keep_one_of) & set(kept):
        raise UserError(
            f"pruning.depth '{criterion}' to num_hidden_layers {keep} drops layers {run[0]} to {run[-1]} and with them "
            f"every full-attention layer ({', '.join(map(str, sorted(must_keep_one_of)))}), of which one must stay: "
            "keep more layers, or use 'block_influence', which always keeps one."
        )
    return kept


def least_influential(influence: Sequence[float], count: int, must_keep_one_of: Collection[int]) -> tuple[int, ...]:
    """The `count` layers with the lowest block influence, in ascending order; on a tie the later one.

    Where none of `must_keep_one_of` would stay, the highest-scored of them takes the place of the lowest-scored layer that would.
    """
    ranked = sorted(range(len(influence)), key=lambda layer: -influence[layer])  # stable: the earlier layer wins a tie
    kept = ranked[: len(ranked) - count]
    if must_keep_one_of and not set(must_keep_one_of) & set(kept):
        kept[-1] = next(layer for layer in ranked if layer in must_keep_one_of)
    return tuple(sorted(set(ranked) - set(kept)))
