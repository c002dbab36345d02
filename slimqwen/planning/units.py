"""Which heads and neurons stay in each block: units of the axes that every block chooses for itself."""

from collections.abc import Collection, Mapping

from torch import Tensor

from slimqwen.calibration.statistics import Sums
from slimqwen.families import Config, Family
from slimqwen.families.axes import Axis
from slimqwen.families.family import Block

Units = list[int] | dict[str, list[int] | list[list[int]]]
"""Kept units of an axis: indices for the whole model, or block name -> indices, or, for an inner axis (query heads
within a KV head, neurons within an expert), block name -> one list of indices per unit around it."""


def kept_units(
    family: Family, config: Config, sums: Sums, kept_layers: Collection[int], sizes: Mapping[Axis, int]
) -> dict[str, Units]:
    """Choose the units of each block with the largest outputs (Minitron, 2408.11796), for every axis within blocks that `sizes` makes smaller.

    Returns axis name -> block -> units.

    A neuron scores the mean of |activation| that it hands to the down projection; a head the mean L2 norm of what it
    hands to the output projection. A KV head or a key head scores the sum over the heads that it takes along. Units stay in
    their order; on a tie the lower one stays. Blocks of layers that go do not appear.
    """
    before = family.sizes(config)
    kept: dict[str, dict[str, list[int] | list[list[int]]]] = {
        axis.name: {} for axis in before if sizes[axis] < before[axis] and axis.scope != "model"
    }
    kept.pop(family.expert.name, None)  # experts are grouped, not only chosen: planning/experts.py

    for block, tensor, axes in family.writers(config):
        units = axes if len(axes) == 1 else axes[:-1]  # of heads, all but the innermost: the dims of one head
        if not any(axis.name in kept for axis in units) or not _stays(block, kept_layers):
            continue
        scores = sums[f"input/{tensor}/{'abs_sums' if len(axes) == 1 else 'norm_sums'}"]  # one dimension per axis
        for depth, axis in enumerate(units, start=1):
            if axis.name in kept:
                own = scores if depth == len(units) else scores.flatten(depth).sum(dim=-1)
                kept[axis.name][block.name] = highest(own, sizes[axis])
    neurons = next(axis for axis in before if axis.scope == "expert")
    for block in family.moe_blocks(config):
        if neurons.name in kept and _stays(block, kept_layers):
            scores = sums[f"experts/{block.name}/neuron_abs_sums"]  # [experts, neurons]
            kept[neurons.name][block.name] = highest(scores, sizes[neurons])
    return dict(kept)


def _stays(block: Block, kept_layers: Collection[int]) -> bool:
    return block.layer is None or block.layer in kept_layers


def highest(scores: Tensor, keep: int) -> list[int] | list[list[int]]:
    """Return the `keep` highest along the last dimension, in ascending order: indices, or one list of them per row.

    Example: scores [[1, 5, 3], [4, 2, 4]], keep 2: [[1, 2], [0, 2]].
    """
    ranked = scores.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    chosen: list[int] | list[list[int]] = ranked.sort(dim=-1).values.tolist()
    return chosen
