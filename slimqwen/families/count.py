"""Parameters of a model from its config alone, in total and per part, in milliseconds."""

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from pydantic import BaseModel, ConfigDict

from slimqwen.families.axes import Axis, size
from slimqwen.families.family import Block, Config, Family


class Counts(BaseModel):
    """`total_parameters` and `active_parameters` leave the MTP module out, as model names do ("80B-A3B").

    Active: what one token of text multiplies with, i.e. everything but the routed experts that were not chosen and
    a vision tower; the input embedding is included, and `active_without_input_embedding` is the other convention.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    total_parameters: int
    active_parameters: int
    active_without_input_embedding: int
    mtp_parameters: int
    mtp_active_parameters: int
    parts: dict[str, int]


def count(family: Family, config: Config) -> Counts:
    """Count every tensor of the table. `parts` sums to `total_parameters`."""
    return Counts(**tally(family, config, family.sizes(config), config["num_experts_per_tok"]))


def tally(family: Family, config: Config, sizes: Mapping[Axis, Any], num_experts_per_tok: Any) -> dict[str, Any]:
    """Compute the fields of `Counts`. `config` has which blocks there are, `sizes` and `num_experts_per_tok` how large.

    Counting only adds and multiplies, so a size may also be an int64 array: arrays that broadcast against one another
    count a whole grid of shapes at once.
    """
    blocks = family.blocks(config)
    parts = parameters([block for block in blocks if not block.is_mtp], sizes)
    mtp = parameters([block for block in blocks if block.is_mtp], sizes)
    active_parameters = active(parts, sizes[family.expert], num_experts_per_tok)
    looked_up = 0 if config["tie_word_embeddings"] else sizes[family.vocab] * sizes[family.hidden]
    return {
        "total_parameters": parts.total(),
        "active_parameters": active_parameters,
        "active_without_input_embedding": active_parameters - looked_up,
        "mtp_parameters": mtp.total(),
        "mtp_active_parameters": active(mtp, sizes[family.expert], num_experts_per_tok),
        "parts": dict(parts),
    }


def parameters(blocks: Iterable[Block], sizes: Mapping[Axis, Any], min_dims: int = 1) -> Counter[str]:
    """Count parameters per part, of the tensors that have at least `min_dims` dimensions."""
    parts: Counter[str] = Counter()
    for block in blocks:
        for part, table in block.tables.items():
            parts[part] += sum(
                prod(size(term, sizes) for term in dims) for dims in table.values() if len(dims) >= min_dims
            )
        if block.experts is not None:
            per_expert = sum(prod(size(term, sizes) for term in dims) for dims in block.experts.per_expert.values())
            parts["routed_experts"] += per_expert * sizes[block.experts.axis]
    return parts


def active(parts: Counter[str], num_experts: Any, num_experts_per_tok: Any) -> Any:
    """Count the parameters among `parts` that one token of text meets."""
    chosen = parts["routed_experts"] // num_experts * num_experts_per_tok
    return parts.total() - parts["routed_experts"] - parts["vision"] + chosen
