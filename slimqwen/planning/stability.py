"""How much the choice depends on the text: the same plan made from two halves of it, or from two sources, compared."""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from statistics import mean

from pydantic import BaseModel, ConfigDict

from slimqwen.calibration.statistics import HALVES, Half, Part, Statistics
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.core.terminal import DataTable, visible
from slimqwen.planning.choose import Choice, choose
from slimqwen.planning.measured_depth import MeasuredDepth
from slimqwen.recipe import PruningRecipe, Target

WHOLE_MODEL = "model"
LAYER = "layer"


class AxisAgreement(BaseModel):
    """How far two choices keep the same units of one axis.

    `jaccard`: block name, or "model" for an axis with one index set, -> |A and B| / |A or B| of the two kept sets, 1
    where they are equal; the mean over them where each enclosing unit (an expert, a KV head) keeps a set of its own.
    `chance`: the same of two random sets. Of n units, k kept: k^2 / n are expected in both, so k / (2n - k).
    """

    model_config = ConfigDict(extra="forbid")

    jaccard: dict[str, float]
    chance: float

    @property
    def mean(self) -> float:
        return mean(self.jaccard.values())

    @property
    def lowest(self) -> str:
        """Where it is lowest."""
        return min(self.jaccard, key=self.jaccard.__getitem__)


class Agreement(BaseModel):
    """Two choices compared: what they were made from, and how far they agree on each axis, by its name."""

    model_config = ConfigDict(extra="forbid")

    between: tuple[str, str]
    axes: dict[str, AxisAgreement]


def measure_stability(
    source: Checkpoint,
    statistics: Statistics,
    target: Target,
    pruning: PruningRecipe,
    measured_depth: MeasuredDepth | None = None,
) -> list[Agreement]:
    """Compare the choice from the even rows with that from the odd rows, then each source alone with each other.

    Raises UserError where a source has one row only.
    """
    for name in statistics.sources:
        if any(Part(name, half) not in statistics.tokens for half in HALVES):
            raise UserError(
                f"stability compares two halves, and '{name}' was measured on one sequence: calibrate on more."
            )
    sizes = {axis.name: size for axis, size in source.family.sizes(source.config).items()}
    sizes[LAYER] = source.config["num_hidden_layers"]
    expert = source.family.expert.name

    def chosen(weights: Mapping[str, float] | None, half: Half | None = None) -> Choice:
        return choose(source, statistics.weighted(weights, half), target, pruning, measured_depth=measured_depth)

    even, odd = (chosen(pruning.source_weights, half) for half in HALVES)
    agreements = [compare(("even rows", "odd rows"), even, odd, sizes, expert)]
    if len(statistics.sources) > 1:
        alone = {
            name: chosen({other: float(other == name) for other in statistics.sources}) for name in statistics.sources
        }
        agreements += [compare((a, b), alone[a], alone[b], sizes, expert) for a, b in combinations(alone, 2)]
    return agreements


def compare(between: tuple[str, str], one: Choice, other: Choice, sizes: Mapping[str, int], expert: str) -> Agreement:
    """Compare two choices for the same target, axis by axis; blocks that only one of them keeps are left out.

    `sizes`: axis name -> units before the cut; `expert`: the name of the expert axis, of which the groups' bases count.
    """
    axes = {}
    others = _kept_sets(other, expert)
    for axis, places in _kept_sets(one, expert).items():
        shared = {
            place: zip(sets, others[axis][place], strict=True)
            for place, sets in places.items()
            if place in others[axis]
        }
        if shared:
            kept = len(next(iter(places.values()))[0])
            axes[axis] = AxisAgreement(
                jaccard={place: mean(jaccard(a, b) for a, b in pairs) for place, pairs in shared.items()},
                chance=kept / (2 * sizes[axis] - kept),
            )
    return Agreement(between=between, axes=axes)


def jaccard(one: Collection[int], other: Collection[int]) -> float:
    """Return |A and B| / |A or B|. Example: {0, 1, 2} and {1, 2, 3} share 2 of 4: 0.5."""
    return len({*one} & {*other}) / len({*one} | {*other})


def _kept_sets(choice: Choice, expert: str) -> dict[str, dict[str, list[list[int]]]]:
    """Return axis name -> where -> the kept sets there, one per enclosing unit."""
    sets = {LAYER: {WHOLE_MODEL: [choice.kept_layers]}}
    for axis, places in choice.kept.items():
        if choice.basis is not None and not isinstance(places, Mapping):
            continue  # directions of two rotations are never the same
        by_place = places if isinstance(places, Mapping) else {WHOLE_MODEL: places}
        sets[axis] = {place: _per_unit(indices) for place, indices in by_place.items()}
    sets[expert] = {block: [[group.base for group in groups]] for block, groups in choice.expert_groups.items()}
    return sets


def _per_unit(indices: list[int] | list[list[int]]) -> list[list[int]]:
    nested = [unit for unit in indices if isinstance(unit, list)]
    return nested or [[unit for unit in indices if isinstance(unit, int)]]


def stability_text(agreements: Sequence[Agreement]) -> str:
    """Return the halves as a table, one row per block, and a sentence for them and for each pair of sources."""
    halves = agreements[0]
    axes = halves.axes
    table = DataTable(f"kept by both, {' and '.join(halves.between)}", *axes)
    for place in dict.fromkeys(place for axis in axes.values() for place in axis.jaccard):
        table.add(place, *(f"{axis.jaccard[place]:.2f}" if place in axis.jaccard else "" for axis in axes.values()))
    table.add_section()
    table.add("mean", *(f"{axis.mean:.2f}" for axis in axes.values()))
    table.add("lowest", *(f"{axis.jaccard[axis.lowest]:.2f}" for axis in axes.values()))
    table.add("by chance", *(f"{axis.chance:.2f}" for axis in axes.values()))
    return "\n".join([table.as_text(120), *map(_sentence, agreements)])


def _sentence(agreement: Agreement) -> str:
    """Return a sentence such as "even rows against odd rows: layer Jaccard 1.00; expert mean Jaccard 0.94, lowest 0.81 in model.layers.3"."""
    parts = []
    for name, axis in agreement.axes.items():
        if list(axis.jaccard) == [WHOLE_MODEL]:
            parts.append(f"{name} Jaccard {axis.mean:.2f}")
        else:
            lowest = f"lowest {axis.jaccard[axis.lowest]:.2f} in {axis.lowest}"
            parts.append(f"{name} mean Jaccard {axis.mean:.2f}, {lowest}")
    return f"{' against '.join(map(visible, agreement.between))}: {'; '.join(parts)}"
