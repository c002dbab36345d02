"""A model family as data: its tensors, their axes, and the config fields that size the axes.

Counting, slicing, merging, checking and exporting all walk `Family.blocks` and `Family.tensors`; nothing else in
slimqwen knows a tensor's name. A new family is one new table (see qwen3_next.py) and one parity test.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from slimqwen.errors import UserError
from slimqwen.families.axes import Axis, Cat, Sizes, Stack, Term, size

Config = dict[str, Any]
"""config.json as it stands, after `Family.normalise`."""

Part = Literal[
    "embedding", "norm", "attention", "deltanet", "router", "routed_experts", "shared_experts", "mtp_projection"
]
Layout = Literal["per_expert", "fused"]
Table = Mapping[str, tuple[Term, ...]]
"""Tensor name below its block -> the term of each dimension. `{expert}` in a name: one tensor per routed expert."""


@dataclass(frozen=True)
class ExpertTable:
    """Routed experts, which lie on disk one tensor per expert, or stacked ("fused") in 3-D tensors.

    `per_expert` is the table; `fused` says which of its tensors, joined along rows, make up each stacked tensor, so
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


@dataclass(frozen=True)
class Block:
    """A part of the model with one name prefix: a decoder layer, the MTP module, or what surrounds the layers.

    `layer` is the decoder layer's number, None elsewhere; `is_mtp` marks the multi-token-prediction module, which
    is counted apart. `tables` are the block's dense tensors by part; `experts` its routed experts, if it has any.
    """

    prefix: str
    tables: Mapping[Part, Table]
    experts: ExpertTable | None = None
    layer: int | None = None
    is_mtp: bool = False

    @property
    def name(self) -> str:
        return self.prefix.removesuffix(".")


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


@dataclass(frozen=True)
class Family:
    """The declarative description of one `model_type`.

    `fields` maps each config field to the axes whose product it is, outer axis first, so that it can be read in both
    directions: a field introduces at most one axis that the fields above it did not.
    """

    model_type: str
    vocab: Axis
    hidden: Axis
    expert: Axis
    router: str
    fields: Mapping[str, tuple[Axis, ...]]
    normalise: Callable[[Config], Config]
    layer_blocks: Callable[[Config], list[Block]]
    attention_layers: Callable[[Config], list[int]]
    surroundings: Callable[[Config], list[Block]]
    with_serving_keys: Callable[[Config], Config]
    serving_note: Callable[[Config], str | None]
    default_layout: Layout

    def sizes(self, config: Config) -> dict[Axis, int]:
        """Size of every axis according to a config. Raises UserError where a field does not divide as it must."""
        sizes: dict[Axis, int] = {}
        for field, axes in self.fields.items():
            if field not in config:
                raise UserError(f"config.json of a {self.model_type} model must have '{field}'; it has not.")
            remaining = config[field]
            if not isinstance(remaining, int) or remaining <= 0:
                raise UserError(f"config.json: '{field}' must be a positive whole number, is {remaining!r}.")
            unknown = [axis for axis in axes if axis not in sizes]
            for axis in axes:
                if axis in sizes and remaining % sizes[axis]:
                    raise UserError(
                        f"config.json: '{field}' = {config[field]} is not a multiple of {sizes[axis]} ({axis.name}s)."
                    )
                remaining = remaining // sizes[axis] if axis in sizes else remaining
            assert len(unknown) == 1, f"{field} must introduce exactly one axis"
            sizes[unknown[0]] = remaining
        return sizes

    def resized(self, config: Config, sizes: Sizes, kept_layers: list[int], num_experts_per_tok: int) -> Config:
        """The config of a model that kept these layers and these many units of each axis, other keys untouched."""
        new = deepcopy(config)
        for field, axes in self.fields.items():
            new[field] = 1
            for axis in axes:
                new[field] *= sizes[axis]
        new["num_hidden_layers"] = len(kept_layers)
        new["layer_types"] = [config["layer_types"][layer] for layer in kept_layers]
        new["num_experts_per_tok"] = num_experts_per_tok
        return self.with_serving_keys(new)

    def blocks(self, config: Config) -> list[Block]:
        """Every block of the model in checkpoint order: surroundings, decoder layers, MTP."""
        around = self.surroundings(config)
        return [b for b in around if not b.is_mtp] + self.layer_blocks(config) + [b for b in around if b.is_mtp]

    def tensors(self, config: Config, layouts: Mapping[str, Layout] | None = None) -> Iterator[TensorSpec]:
        """Every tensor that a checkpoint of this config holds. `layouts`: block name -> layout of its experts."""
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

    def mtp_tensors(self, config: Config) -> list[str]:
        """Names of the MTP module's own dense tensors: where none is there, a checkpoint has no MTP module."""
        blocks = [block for block in self.blocks(config) if block.is_mtp]
        return [block.prefix + name for block in blocks for table in block.tables.values() for name in table]

    def moe_blocks(self, config: Config) -> list[Block]:
        """The blocks that route to experts, MTP's last."""
        return [block for block in self.blocks(config) if block.experts is not None]

    def residual_norms(self, config: Config) -> list[tuple[Block, str]]:
        """The norms over the residual stream, as (block, tensor name): the vectors over the hidden axis."""
        return [
            (block, block.prefix + name)
            for block in self.blocks(config)
            for name, dims in block.tables.get("norm", {}).items()
            if dims == (self.hidden,)
        ]

    def detect_layouts(self, config: Config, names: set[str]) -> dict[str, Layout]:
        """How each block's experts lie in a checkpoint with these tensor names; both may occur in one checkpoint."""
        layouts: dict[str, Layout] = {}
        for block in self.moe_blocks(config):
            assert block.experts is not None
            fused = any(block.prefix + name in names for name in block.experts.fused)
            layouts[block.name] = "fused" if fused else "per_expert"
        return layouts
