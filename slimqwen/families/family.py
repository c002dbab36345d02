"""A model family as data: its tensors, their axes, and the config fields that size the axes.

Counting, slicing, merging, checking and exporting all walk `Family.blocks` and `Family.tensors`; nothing else in
slimqwen names a tensor. A new family is one new table (docs/adding-a-family.md).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from slimqwen.core.errors import UserError
from slimqwen.families.axes import Axis, Cat, Sizes, Stack, Term, axes_of, nest, size

Config = dict[str, Any]
"""A model's configuration in canonical words, which are the same in every family (docs/adding-a-family.md).

`Family.normalise` makes it from config.json, `Family.to_disk` turns it back."""

LARGEST_SIZE = 1 << 31  # of any axis; more is a damaged file

Part = Literal[
    "embedding",
    "norm",
    "attention",
    "deltanet",
    "dense_mlp",
    "router",
    "routed_experts",
    "shared_experts",
    "mtp_projection",
    "vision",
]
Layout = Literal["per_expert", "fused"]
Table = Mapping[str, tuple[Term, ...]]
"""Tensor name below its block -> the term of each dimension. `{expert}` in a name: one tensor per routed expert."""


@dataclass(frozen=True)
class ExpertTable:
    """Routed experts, which lie on disk one tensor per expert, or stacked ("fused") in 3-D tensors.

    `per_expert` is the table; `fused` lists which of its tensors, joined along rows, make up each stacked tensor, so
    that the stacked shapes are derived: `[experts, sum of rows, columns]`.
    """

    axis: Axis
    per_expert: Table
    fused: Mapping[str, tuple[str, ...]]

    def table(self, layout: Layout) -> Table:
        if layout == "per_expert":
            return self.per_expert
        stacked: dict[str, tuple[Term, ...]] = {}
        for name, joined in self.fused.items():
            rows = Cat(tuple((part, self.per_expert[part][0]) for part in joined))
            stacked[name] = (Stack(self.axis), rows, self.per_expert[joined[0]][1])
        return stacked

    def holder(self, pattern: str) -> str:
        """Return the stacked tensor that a matrix of `per_expert` is a part of."""
        return next(name for name, joined in self.fused.items() if pattern in joined)

    def rows(self, pattern: str, sizes: Sizes) -> slice:
        """Return the rows that a matrix of `per_expert` has of an expert in its stacked tensor."""
        joined = self.fused[self.holder(pattern)]
        start = sum(size(self.per_expert[part][0], sizes) for part in joined[: joined.index(pattern)])
        return slice(start, start + size(self.per_expert[pattern][0], sizes))


@dataclass(frozen=True)
class Recall:
    """What a block remembers of a sequence while it generates, and what reading it costs.

    cached: elements kept per past token. read: multiply-adds with them, per past token, for each new token. state:
    elements kept per sequence, however long it is; "recurrent" is held in float32, the rest in the model's dtype.
    """

    cached: Mapping[str, Term]
    read: Mapping[str, Term]
    state: Mapping[str, tuple[Term, ...]]


@dataclass(frozen=True)
class Block:
    """A part of the model with one name prefix: a decoder layer, the MTP module, or what surrounds the layers.

    `layer` is the decoder layer's number, None elsewhere; `is_mtp` marks the multi-token-prediction module, which
    is counted apart. `tables` are the block's dense tensors by part; `experts` its routed experts, if it has any;
    `recall` what its token mixer remembers, if it has one.
    """

    prefix: str
    tables: Mapping[Part, Table]
    experts: ExpertTable | None = None
    layer: int | None = None
    is_mtp: bool = False
    recall: Recall | None = None

    @property
    def name(self) -> str:
        return self.prefix.removesuffix(".")

    def module_tensors(self) -> list[str]:
        """Return the names of the block's tensors with its experts stacked, which is how Transformers' modules hold them."""
        dense = [name for table in self.tables.values() for name in table]
        return [self.prefix + name for name in (*dense, *(self.experts.fused if self.experts else ()))]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint: its name, shape and axes; `expert` where it belongs to a single routed expert."""

    name: str
    pattern: str
    dims: tuple[Term, ...]
    shape: tuple[int, ...]
    block: Block
    part: Part
    expert: int | None = None


def positive(config: Config, key: str) -> int:
    """Return a size out of a config. Raises UserError where it is missing or not a positive whole number of a sane size."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST_SIZE:
        raise UserError(f"config.json: '{key}' must be a positive whole number, is {repr(value)[:40]}.")
    return value


def _nothing_to_refuse(config: Config) -> None:
    pass


def _same_name(name: str, config: Config) -> str:
    return name


@dataclass(frozen=True)
class Family:
    """The declarative description of one `model_type`.

    `fields` maps each size in the canonical config to the axes whose product it is, outer axis first, so that it can be
    read in both directions: a field introduces exactly one axis, its last, that the fields above it did not.
    """

    model_type: str
    architecture: str
    """The word for its causal language model in a config.json's `architectures`."""
    vocab: Axis
    hidden: Axis
    expert: Axis
    router: str
    """The router's weight, below its block."""
    fields: Mapping[str, tuple[Axis, ...]]
    normalise: Callable[[Config], Config]
    """config.json -> canonical config. Makes explicit what is left to a default, refuses what the table cannot describe."""
    to_disk: Callable[[Config], Config]
    """Canonical config -> config.json, in the words that Transformers and the serving engines read."""
    layer_blocks: Callable[[Config], list[Block]]
    surroundings: Callable[[Config], list[Block]]
    default_layout: Layout
    validate: Callable[[Config], None] = _nothing_to_refuse
    """Raise UserError for sizes that the architecture cannot have together."""
    serving_note: Callable[[Config], str | None] = lambda config: None
    """What a user should know before serving a model of this config, if anything."""
    module_name: Callable[[str, Config], str] = _same_name
    """Where Transformers' modules (and `mtp.` ours) hold what a checkpoint calls by this name."""
    as_found: Callable[[Config, Collection[str]], Config] = lambda config, names: config
    """The canonical config of a checkpoint with these tensor names, where the names know more than config.json."""
    mtp_names: Callable[[Config, Collection[str]], set[str]] = lambda config, names: {
        name for name in names if name.startswith("mtp.")
    }
    """Those of these tensor names that are an MTP module's, whether config.json has one or not."""
    language_model: "Callable[[Config], tuple[Family, Config]] | None" = None
    """Of a wrapper: its language model by itself, which is what a checkpoint without the vision tower holds."""
    mtp_config: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of Transformers' config that make its decoder layer number 0 the MTP module's."""
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    float32_tensors: tuple[str, ...] = ()
    """Ends of the names, in Transformers' modules, of weights that its code computes with in float32 whatever the model's dtype."""
    norm_offset: float = 0.0
    """A norm over the residual stream multiplies by this + its weight: 1 where weights begin at 0."""
    published_active: tuple[str, ...] = ()
    """What its papers print of active parameters and how that was counted: lines of the footnote to a count."""

    def sizes(self, config: Config) -> dict[Axis, int]:
        """Return the size of every axis according to a config. Raises UserError where a field does not divide as it must."""
        sizes: dict[Axis, int] = {}
        for key, axes in self.fields.items():
            value = positive(config, key)
            *outer, new = axes
            units = prod(sizes[axis] for axis in outer)
            if value % units:
                of = " x ".join(f"{sizes[axis]} {axis.name}s" for axis in outer)
                raise UserError(f"config.json: '{key}' = {value} is not a multiple of {units} ({of}).")
            sizes[new] = value // units
        return sizes

    def resized(self, config: Config, sizes: Sizes, kept_layers: list[int], num_experts_per_tok: int) -> Config:
        """Return the config of a model that kept these layers and these many units of each axis, other keys untouched."""
        new = deepcopy(config)
        for key, axes in self.fields.items():
            new[key] = prod(sizes[axis] for axis in axes)
        new["num_hidden_layers"] = len(kept_layers)
        for kinds in ("layer_types", "mlp_layer_types"):
            new[kinds] = [config[kinds][layer] for layer in kept_layers]
        new["num_experts_per_tok"] = num_experts_per_tok
        self.validate(new)
        return new

    def attention_layers(self, config: Config) -> list[int]:
        """Return the layers that keep a KV cache; at least one must remain (formats.md: a linear-only stack fails with a cache)."""
        return [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]

    def sources(self, config: Config, new: Config, kept_layers: list[int]) -> dict[str, Block]:
        """Return each block of a cut model, by name -> the block of the source that it comes from.

        Decoder layers by `kept_layers`; the others by their place: a name may count the layers (MTP of GLM-4).
        """
        layers = self.layer_blocks(config)
        around = [block for block in self.blocks(config) if block.layer is None]
        around_new = [block for block in self.blocks(new) if block.layer is None]
        pairs = list(zip(around_new, around, strict=True))
        pairs += zip(self.layer_blocks(new), (layers[layer] for layer in kept_layers), strict=True)
        return {mine.name: theirs for mine, theirs in pairs}

    def blocks(self, config: Config) -> list[Block]:
        """Return every block of the model in checkpoint order: surroundings, decoder layers, MTP."""
        around = self.surroundings(config)
        return [b for b in around if not b.is_mtp] + self.layer_blocks(config) + [b for b in around if b.is_mtp]

    def tensors(self, config: Config, layouts: Mapping[str, Layout] | None = None) -> Iterator[TensorSpec]:
        """Yield every tensor that a checkpoint of this config holds. `layouts`: block name -> layout of its experts."""
        sizes = self.sizes(config)
        for block in self.blocks(config):
            for part, table in block.tables.items():
                for name, dims in table.items():
                    shape = tuple(size(term, sizes) for term in dims)
                    yield TensorSpec(block.prefix + name, name, dims, shape, block, part)
            if block.experts is not None:
                layout = self.default_layout if layouts is None else layouts[block.name]
                for pattern, dims in block.experts.table(layout).items():
                    shape = tuple(size(term, sizes) for term in dims)
                    for expert in range(sizes[block.experts.axis]) if layout == "per_expert" else (None,):
                        name = block.prefix + pattern.format(expert=expert)
                        yield TensorSpec(name, pattern, dims, shape, block, "routed_experts", expert)

    def moe_blocks(self, config: Config) -> list[Block]:
        """Return the blocks that route to experts, MTP's last."""
        return [block for block in self.blocks(config) if block.experts is not None]

    def axes_in_use(self, config: Config) -> set[Axis]:
        """Return the axes that occur in a tensor of this model: without dense layers nothing has their neurons."""
        tables = [table for block in self.blocks(config) for table in block.tables.values()]
        tables += [block.experts.per_expert for block in self.moe_blocks(config) if block.experts]
        terms = {term for table in tables for dims in table.values() for term in dims}
        return set().union(*(axes_of(term) for term in terms), {self.expert})

    def writers(self, config: Config) -> list[tuple[Block, str, tuple[Axis, ...]]]:
        """Return the dense matrices that write a mixer's or a network's output into the residual stream, by block and name.

        Last the axes of their columns, outermost first: one axis of neurons, or heads within heads and a head's dims.
        """
        inner = ("attention", "deltanet", "shared_experts", "dense_mlp")
        return [
            (block, block.prefix + name, nest(dims[1]))
            for block in self.blocks(config)
            for part, table in block.tables.items()
            for name, dims in table.items()
            if part in inner and len(dims) == 2 and dims[0] == self.hidden
        ]

    def residual_norms(self, config: Config) -> list[tuple[Block, str]]:
        """Return the norms over the residual stream, as (block, tensor name): the vectors over the hidden axis."""
        return [
            (block, block.prefix + name)
            for block in self.blocks(config)
            for name, dims in block.tables.get("norm", {}).items()
            if dims == (self.hidden,)
        ]

    def detect_layouts(self, config: Config, names: set[str]) -> dict[str, Layout]:
        """Return how each block's experts lie in a checkpoint with these tensor names; both may occur in one checkpoint."""
        layouts: dict[str, Layout] = {}
        for block in self.moe_blocks(config):
            assert block.experts is not None
            fused = any(block.prefix + name in names for name in block.experts.fused)
            layouts[block.name] = "fused" if fused else "per_expert"
        return layouts
