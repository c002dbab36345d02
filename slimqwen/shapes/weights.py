"""A model's weights as training holds them: by what is gathered at one time, and by what is trained. No torch."""

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from slimqwen.families import Config, Family
from slimqwen.families.axes import Sizes, size
from slimqwen.families.count import parameters
from slimqwen.families.family import Block

# The parts whose matrices Muon updates (training/optimizer.py); AdamW updates all else.
MUON_PARTS = frozenset({"attention", "deltanet", "dense_mlp", "shared_experts", "mtp_projection"})


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered at one time: a layer's, or those around the layers.

    dense: all but the routed experts, `routed`. trained_*: those of them that are trained. muon: those that Muon updates. rounding,
    trained_rounding: how many more there are where each tensor is rounded up to a power of two, of all and of those that are trained.
    """

    dense: int = 0
    routed: int = 0
    trained_dense: int = 0
    trained_routed: int = 0
    muon: int = 0
    rounding: int = 0
    trained_rounding: int = 0

    def __add__(self, other: "Unit") -> "Unit":
        return Unit(
            self.dense + other.dense,
            self.routed + other.routed,
            self.trained_dense + other.trained_dense,
            self.trained_routed + other.trained_routed,
            self.muon + other.muon,
            self.rounding + other.rounding,
            self.trained_rounding + other.trained_rounding,
        )

    @property
    def total(self) -> int:
        return self.dense + self.routed

    @property
    def trained(self) -> int:
        return self.trained_dense + self.trained_routed

    def gathered(self, expert_ranks: int = 1) -> int:
        """Return the parameters that a rank has once the unit is gathered: of the routed experts its share."""
        return self.dense + -(-self.routed // expert_ranks)

    def trained_gathered(self, expert_ranks: int = 1) -> int:
        """Return those of them that are trained."""
        return self.trained_dense + -(-self.trained_routed // expert_ranks)


@dataclass(frozen=True)
class Weights:
    """A model's weights: of each layer, MTP's included, and of what surrounds the layers: embedding, norm, lm_head, MTP's projection."""

    layers: tuple[Unit, ...]
    around: Unit

    @property
    def all(self) -> Unit:
        return sum(self.layers, self.around)

    def largest_layer(self, expert_ranks: int = 1) -> int:
        """Return the gathered parameters of the largest layer."""
        return max((unit.gathered(expert_ranks) for unit in self.layers), default=0)


def weigh(family: Family, config: Config, frozen: Collection[str] = ()) -> Weights:
    """Count the weights of a model, of whose parts those in `frozen` are not trained. A vision tower is never loaded."""
    sizes = family.sizes(config)
    layers, around = [], Unit()
    for block in language_blocks(family, config):
        unit = _unit(block, sizes, frozen)
        if block.recall is not None:
            layers.append(unit)
        else:
            around += unit
    return Weights(tuple(layers), around)


def language_blocks(family: Family, config: Config) -> list[Block]:
    """List the blocks that are trained; a vision tower is copied on disk but never loaded."""
    return [block for block in family.blocks(config) if "vision" not in block.tables]


def _unit(block: Block, sizes: Sizes, frozen: Collection[str]) -> Unit:
    parts = parameters([block], sizes)
    routed = parts.pop("routed_experts", 0)
    matrices = (
        prod(size(term, sizes) for term in dims)
        for part, table in block.tables.items()
        for dims in table.values()
        if part in MUON_PARTS and part not in frozen and len(dims) == 2
    )
    tables = {str(part): table for part, table in block.tables.items()}
    if block.experts is not None:
        tables["routed_experts"] = block.experts.table("fused")
    rounding = {
        part: sum(_rounding(prod(size(term, sizes) for term in dims)) for dims in table.values())
        for part, table in tables.items()
    }
    return Unit(
        dense=parts.total(),
        routed=routed,
        trained_dense=sum(amount for part, amount in parts.items() if part not in frozen),
        trained_routed=0 if "routed_experts" in frozen else routed,
        muon=sum(matrices),
        rounding=sum(rounding.values()),
        trained_rounding=sum(amount for part, amount in rounding.items() if part not in frozen),
    )


def _rounding(elements: int) -> int:
    """Return how many elements a tensor lacks to a power of two."""
    return int(2 ** (elements - 1).bit_length()) - elements
