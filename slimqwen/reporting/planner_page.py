"""The planner page: a model's costs as formulas of its sizes, and sliders for the sizes, in one HTML file."""

from pathlib import Path
from typing import Any

from slimqwen.artifacts import write_text
from slimqwen.families import Config, Family
from slimqwen.families.axes import Axis, size
from slimqwen.families.count import parameters
from slimqwen.families.family import Block
from slimqwen.recipe import Target
from slimqwen.reporting.html import render
from slimqwen.shapes.footprint import BYTES_OF, cached_elements, dtype_of, state_elements
from slimqwen.shapes.polynomial import Polynomial
from slimqwen.shapes.target import completed, shape_of

SLIDERS = {  # field -> increment
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
GPU_GB = {  # nominal memory, 10^9 bytes
    "RTX 4090": 24,
    "L40S": 48,
    "A100 / H100": 80,
    "H200": 141,
    "B200": 192,
    "MI300X": 192,
}


def write_planner_page(family: Family, config: Config, target: Target, out: Path) -> None:
    """Write `out`, a self-contained page. The sliders start at `target`, or at the model's own sizes."""
    page = render(
        "planner.html.j2",
        model_type=family.model_type,
        model=formulas(family, config),
        start=start(family, config, target),
        has_state=any(state_elements(family.blocks(config), family.sizes(config)).values()),
    )
    write_text(out, page)


def start(family: Family, config: Config, target: Target) -> dict[str, int]:
    """Return the sliders' initial values."""
    shape: dict[str, int] = completed(family, target, config).model_dump(exclude_none=True)
    return {field: shape[field] for field in _sliders(family, config)}


def formulas(family: Family, config: Config) -> dict[str, Any]:
    """Return the data for the page's computations, JSON-serialisable.

    blocks: the distinct kinds of block, each a mapping of quantities to polynomials, [[axis names], coefficient]. layers:
    the kind of each decoder layer; a cut keeps the first ones. around and mtp: kinds of the blocks beside the layers.
    """
    axes: dict[Axis, Any] = {axis: Polynomial.unknown(axis.name) for axis in family.sizes(config)}
    kinds: list[dict[str, Any]] = []

    def kind(block: Block) -> int:
        found = _block_formulas(block, axes)
        if found not in kinds:
            kinds.append(found)
        return kinds.index(found)

    everything = family.blocks(config)
    return {
        "blocks": kinds,
        "layers": [kind(block) for block in everything if block.layer is not None],
        "around": [kind(block) for block in everything if block.layer is None and not block.is_mtp],
        "mtp": [kind(block) for block in everything if block.is_mtp],
        "axis_of": {field: axes[-1].name for field, axes in family.fields.items()},
        "sizes": {axis.name: size for axis, size in family.sizes(config).items()},
        "source": shape_of(family, config).model_dump(exclude_none=True),
        "sliders": _sliders(family, config),
        "vocab": family.vocab.name,
        "hidden": family.hidden.name,
        "expert": family.expert.name,
        "tied": config["tie_word_embeddings"],
        "bytes_per_element": BYTES_OF[dtype_of(config)],
        "gpus": GPU_GB,
    }


def _sliders(family: Family, config: Config) -> dict[str, dict[str, int]]:
    """Return the sliders with their bounds, for the sizes of this model, up to its own."""
    known = shape_of(family, config).model_dump(exclude_none=True)
    in_use = family.axes_in_use(config)
    sliders = {}
    for field, step in SLIDERS.items():
        is_axis = field in family.fields
        if field in known and (not is_axis or family.fields[field][-1] in in_use):
            step = step if known[field] % step == 0 and known[field] >= 4 * step else 1
            sliders[field] = {"min": step, "max": known[field], "step": step}
    return sliders


def _block_formulas(block: Block, axes: dict[Axis, Any]) -> dict[str, Any]:
    """Return a block's quantities: parameters, matrices in a token's forward pass, cache and state (`footprint`)."""
    parts, matrices = parameters([block], axes), parameters([block], axes, min_dims=2)
    state = state_elements([block], axes)
    quantities = {
        "routed": parts.pop("routed_experts", 0),
        "vision": parts.pop("vision", 0),
        "dense": sum(parts.values()),
        "routed_matrices": matrices.pop("routed_experts", 0),
        "dense_matrices": sum(amount for part, amount in matrices.items() if part != "vision"),
        "cached": cached_elements([block], axes),
        "read": sum(size(term, axes) for term in block.recall.read.values()) if block.recall else 0,
        "recurrent": state.pop("recurrent", 0),
        "state": sum(state.values()),
    }
    return {name: [[list(m), c] for m, c in Polynomial.of(value).terms] for name, value in quantities.items()}
