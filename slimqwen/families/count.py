"""Parameters of a model from its config alone, in total and per part, in milliseconds."""

from collections import Counter
from math import prod

from pydantic import BaseModel, ConfigDict

from slimqwen.families.axes import size
from slimqwen.families.family import Config, Family


class Counts(BaseModel):
    """`total_parameters` and `active_parameters` leave the MTP module out, as model names do ("80B-A3B").

    Active: what one token multiplies with, i.e. everything but the routed experts that were not chosen; the input
    embedding is included, and `active_without_input_embedding` is the other convention.
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
    sizes = family.sizes(config)
    parts: Counter[str] = Counter()
    mtp: Counter[str] = Counter()
    for block in family.blocks(config):
        bucket = mtp if block.is_mtp else parts
        for part, table in block.tables.items():
            bucket[part] += sum(prod(size(term, sizes) for term in dims) for dims in table.values())
        if block.experts is not None:
            per_expert = sum(prod(size(term, sizes) for term in dims) for dims in block.experts.per_expert.values())
            bucket["routed_experts"] += per_expert * sizes[block.experts.axis]

    def active(bucket: Counter[str]) -> int:
        chosen: int = bucket["routed_experts"] // sizes[family.expert] * config["num_experts_per_tok"]
        return bucket.total() - bucket["routed_experts"] + chosen

    embedding = sizes[family.vocab] * sizes[family.hidden]
    return Counts(
        total_parameters=parts.total(),
        active_parameters=active(parts),
        active_without_input_embedding=active(parts) - (0 if config["tie_word_embeddings"] else embedding),
        mtp_parameters=mtp.total(),
        mtp_active_parameters=active(mtp),
        parts=dict(parts),
    )
