"""What serving engines (vLLM, SGLang) ask of a model's sizes: ranks must share them evenly, kernels like multiples."""

from slimqwen.families import Config, Family
from slimqwen.families.axes import Axis, axes_of

PARALLEL_SIZES = range(1, 9)
KERNEL_MULTIPLE = 128  # tiles of the fast matrix kernels, and the blocks of FP8 quantisation
KERNEL_FIELDS = (
    "hidden_size",
    "head_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "intermediate_size",
)
KV_FIELD = "num_key_value_heads"

Obstacles = dict[int, list[str]]
"""Number of ranks -> the sizes that they cannot share evenly; empty where it works."""


def tensor_parallel(family: Family, config: Config) -> Obstacles:
    """The sizes that tensor-parallel ranks split (heads and neurons) against 1 to 8 ranks.

    The axes that differ from block to block are split; those of the whole model (the residual stream, the dims of a
    head) stay whole on every rank, and the vocabulary is padded. Fewer KV heads than ranks are replicated.
    """
    split = {
        field: config[field]
        for field, axes in _used_fields(family, config).items()
        if all(axis.scope != "model" for axis in axes) and family.expert not in axes
    }
    return {
        ranks: [f"{field} {size}" for field, size in split.items() if not _shared_evenly(field, size, ranks)]
        for ranks in PARALLEL_SIZES
    }


def expert_parallel(family: Family, config: Config) -> Obstacles:
    """The number of experts against 1 to 8 expert-parallel ranks."""
    experts = config["num_experts"]
    return {ranks: [f"num_experts {experts}"] * (experts % ranks != 0) for ranks in PARALLEL_SIZES}


def replicated_kv_heads(config: Config) -> list[int]:
    """Numbers of ranks at which several hold the same KV head."""
    return [ranks for ranks in PARALLEL_SIZES if ranks > config[KV_FIELD] and ranks % config[KV_FIELD] == 0]


def slow_sizes(family: Family, config: Config) -> list[str]:
    """Sizes that are not a multiple of 128."""
    used = _used_fields(family, config)
    return [f"{field} {config[field]}" for field in KERNEL_FIELDS if field in used and config[field] % KERNEL_MULTIPLE]


def _shared_evenly(field: str, size: int, ranks: int) -> bool:
    return size % ranks == 0 or (field == KV_FIELD and ranks % size == 0)


def _used_fields(family: Family, config: Config) -> dict[str, tuple[Axis, ...]]:
    """The fields that size a tensor of this very model: its config may carry others (a model without dense layers)."""
    used: set[Axis] = set()
    for block in family.blocks(config):
        tables = [*block.tables.values(), *([block.experts.per_expert] if block.experts else [])]
        used |= {axis for table in tables for dims in table.values() for term in dims for axis in axes_of(term)}
    return {field: axes for field, axes in family.fields.items() if used.issuperset(axes)}
