"""Which heads and neurons stay in each block: units of the axes that every block chooses for itself."""

from collections.abc import Collection, Mapping

from torch import Tensor

from slimqwen.calibration.statistics import Sums
from slimqwen.families import Config, Family
from slimqwen.families.axes import Axis
from slimqwen.families.family import Block

KeptUnits = dict[str, dict[str, list[int] | list[list[int]]]]
"""Axis name -> block name -> indices; for an inner axis (query heads within a KV head, neurons within an expert) one
list per unit around it."""


def kept_units(
    family: Family, config: Config, sums: Sums, kept_layers: Collection[int], sizes: Mapping[Axis, int]
) -> KeptUnits:
    """For every axis that `sizes` makes smaller, the units of each block with the largest outputs (Minitron, 2408.11796).

    A neuron scores the mean of |activation| that it hands to the down projection; a head the mean L2 norm of what it
    hands to the output projection. A KV head or a key head scores the sum over the heads that it takes along. Units stay in
    their order; on a tie the lower one stays. Blocks of layers that go do not appear.
    """
    before = family.sizes(config)
    kept: KeptUnits = {axis.name: {} for axis in before if sizes[axis] < before[axis] and axis.scope != "model"}
    kept.pop(family.expert.name, None)  # experts are grouped, not only chosen: planning/experts.py

    def choose(axis: Axis, block: Block, scores: Tensor) -> None:
        if axis.name in kept:
            kept[axis.name][block.name] = highest(scores, sizes[axis])

    for block, tensor, axes in family.writers(config):
        if block.layer is not None and block.layer not in kept_layers:
            continue
        if len(axes) == 1:
            choose(axes[0], block, sums[f"input/{tensor}/abs_sums"])
        else:
            *units, _ = axes
            scores = sums[f"input/{tensor}/norm_sums"]  # one dimension per axis of `units`
            for depth, axis in enumerate(units):
                choose(axis, block, scores.flatten(depth + 1).sum(dim=-1) if depth + 1 < len(units) else scores)
    for block in family.moe_blocks(config):
        if block.experts is not None and (block.layer is None or block.layer in kept_layers):
            neurons = next(axis for axis in before if axis.scope == "expert")
            choose(neurons, block, sums[f"experts/{block.name}/neuron_abs_sums"])
    return kept


def highest(scores: Tensor, keep: int) -> list[int] | list[list[int]]:
    """The `keep` highest along the last dimension, in ascending order: indices, or one list of them per row.

    Example: scores [[1, 5, 3], [4, 2, 4]], keep 2: [[1, 2], [0, 2]].
    """
    ranked = scores.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    chosen: list[int] | list[list[int]] = ranked.sort(dim=-1).values.tolist()
    return chosen
