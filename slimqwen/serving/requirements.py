"""Requirements of serving engines: sizes that divide over ranks and suit kernels; tensor names, shapes and config keys."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from slimqwen.core.errors import UserError, did_you_mean, shown
from slimqwen.families import Config, Family
from slimqwen.families.axes import Axis, axes_of
from slimqwen.families.canonical import full_attention_interval, periodic_layer_types
from slimqwen.families.family import Layout, TensorSpec
from slimqwen.serving.engines import ENGINES, Engine, Loader, Names

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
"""Number of ranks -> the sizes that it does not divide; empty where it works."""


def tensor_parallel(family: Family, config: Config) -> Obstacles:
    """Check the sizes that tensor-parallel ranks split (heads and neurons) against 1 to 8 ranks.

    The axes that differ from block to block are split; those of the whole model (the residual stream, the dims of a
    head) stay whole on every rank, and the vocabulary is padded. Fewer KV heads than ranks are replicated.
    """
    split = {
        field: config[field]
        for field, axes in _used_fields(family, config).items()
        if all(axis.scope != "model" for axis in axes) and family.expert not in axes
    }
    return {
        ranks: [f"{field} {size}" for field, size in split.items() if not _divides(field, size, ranks)]
        for ranks in PARALLEL_SIZES
    }


def expert_parallel(family: Family, config: Config) -> Obstacles:
    """Check the number of experts against 1 to 8 expert-parallel ranks."""
    experts = config["num_experts"]
    return {ranks: [f"num_experts {experts}"] * (experts % ranks != 0) for ranks in PARALLEL_SIZES}


def replicated_kv_heads(config: Config) -> list[int]:
    """List the numbers of ranks at which several hold the same KV head."""
    return [ranks for ranks in PARALLEL_SIZES if ranks > config[KV_FIELD] and ranks % config[KV_FIELD] == 0]


def slow_sizes(family: Family, config: Config) -> list[str]:
    """List the sizes that are not a multiple of KERNEL_MULTIPLE."""
    used = _used_fields(family, config)
    return [f"{field} {config[field]}" for field in KERNEL_FIELDS if field in used and config[field] % KERNEL_MULTIPLE]


def size_caveats(family: Family, config: Config) -> list[str]:
    """List what the sizes rule out or make slow, one sentence each."""
    caveats = []
    parallel = {"tensor": tensor_parallel(family, config), "expert": expert_parallel(family, config)}
    for kind, obstacles in parallel.items():
        for ranks in (2, 4, 8):  # the usual numbers; the others are in the table
            if obstacles[ranks]:
                caveats.append(f"{kind} parallel {ranks} does not divide {', '.join(obstacles[ranks])}.")
    if slow := slow_sizes(family, config):
        caveats.append(
            f"{', '.join(slow)}: not a multiple of {KERNEL_MULTIPLE}, which fast kernels and FP8 blocks require."
        )
    return caveats


def _divides(field: str, size: int, ranks: int) -> bool:
    return size % ranks == 0 or (field == KV_FIELD and ranks % size == 0)


def _used_fields(family: Family, config: Config) -> dict[str, tuple[Axis, ...]]:
    """Return the config fields that size a tensor of this model; its config may have others (of dense layers, say)."""
    used: set[Axis] = set()
    for block in family.blocks(config):
        tables = [*block.tables.values(), *([block.experts.per_expert] if block.experts else [])]
        used |= {axis for table in tables for dims in table.values() for term in dims for axis in axes_of(term)}
    return {field: axes for field, axes in family.fields.items() if used.issuperset(axes)}


# --- one engine at a time ---------------------------------------------------------------------------------------------


class CheckpointLike(Protocol):
    """The parts of a checkpoint that a loader depends on: a `Checkpoint`, or one not yet written (`PlannedCheckpoint`)."""

    @property
    def family(self) -> Family: ...
    @property
    def config(self) -> Config: ...
    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...
    @property
    def has_mtp(self) -> bool: ...


@dataclass(frozen=True)
class PlannedCheckpoint:
    """The checkpoint that would be written for a config, as a loader would see it."""

    family: Family
    config: Config
    specs: Mapping[str, TensorSpec]

    @classmethod
    def of(cls, family: Family, config: Config, layouts: Mapping[str, Layout] | None = None) -> "PlannedCheckpoint":
        """Derive it from a config. layouts: of the experts by block name; None: as in the family's releases."""
        written = family.normalise(family.to_disk(config))
        return cls(family, written, {spec.name: spec for spec in family.tensors(config, layouts)})

    @property
    def has_mtp(self) -> bool:
        return bool(self.config["num_nextn_predict_layers"])


class LoadResult(BaseModel):
    """Whether an engine's loader, according to engines.py, accepts a checkpoint.

    `problems`: why it does not (empty: it does). `notes`: differences from Transformers, and parts that it ignores.
    `drafts`: whether it can draft with the checkpoint's MTP module.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    problems: list[str]
    notes: list[str]
    drafts: bool


def find_engines(names: Iterable[str]) -> list[Engine]:
    """Return the engines with these names, or all for 'all'. Raises UserError for an unknown name."""
    chosen: dict[str, Engine] = {}
    for name in names:
        if name != "all" and name not in ENGINES:
            known = ", ".join(ENGINES)
            raise UserError(
                f"engine {shown(name)} is not known{did_you_mean(name, ENGINES)}: give one of {known}, all."
            )
        chosen |= ENGINES if name == "all" else {name: ENGINES[name]}
    return list(chosen.values())


def check_loader(engine: Engine, checkpoint: CheckpointLike) -> LoadResult:
    """Compare a checkpoint's tensors, sizes and config.json with the requirements of one engine's loader."""
    model_type, config = checkpoint.family.model_type, checkpoint.config
    if model_type not in engine.loaders:
        problem = f"it does not support model_type {model_type}"
        return LoadResult(version=engine.version, problems=[problem], notes=[], drafts=False)
    loader = engine.loaders[model_type]
    backbone = [spec for spec in checkpoint.specs.values() if not spec.block.is_mtp]
    problems = [
        *_wrong_config(loader, config),
        *_wrong_sizes(loader, config),
        *_without_place(loader.names, backbone, loader.unchecked),
        *(f"it needs '{name}', which tied embeddings omit" for name in loader.needs if name not in checkpoint.specs),
    ]
    not_drafting = _mtp_problems(loader, checkpoint)
    unchecked = [
        note for prefix, note in loader.unchecked.items() if any(spec.name.startswith(prefix) for spec in backbone)
    ]
    return LoadResult(
        version=engine.version,
        problems=problems,
        notes=[*not_drafting, *_ignored_keys(loader, config), *unchecked, *([engine.note] if engine.note else [])],
        drafts=checkpoint.has_mtp and not problems and not not_drafting,
    )


def describe_load(name: str, result: LoadResult) -> str:
    """Describe a result on one line, such as `sglang 0.5.23: does not load: ...`."""
    if result.problems:
        text = f"does not load: {'; '.join(result.problems)}"
    else:
        text = "loads, and drafts with the MTP module" if result.drafts else "loads"
        text += f", but {'; '.join(result.notes)}" if result.notes else ""
    return f"{name} {result.version}: {text}"


def _wrong_config(loader: Loader, config: Config) -> Iterator[str]:
    """Yield problems of the keys by which an engine chooses its code, or for which it would use a default."""
    architectures = config.get("architectures") or []
    if loader.architecture is not None and loader.architecture not in architectures:
        yield (
            f"it chooses its code by config.json's architectures, which are {shown(architectures)} and must include "
            f"'{loader.architecture}'"
        )
    if loader.counts_layers and full_attention_interval(config) is None:
        yield "it counts layers by full_attention_interval, and these do not alternate regularly"
        return
    for key, otherwise in loader.keys.items():
        if config.get(key) is None:
            yield f"config.json lacks {key}: {otherwise}"
    interval = config.get("full_attention_interval")
    if loader.counts_layers and interval is not None and periodic_layer_types(config) != config["layer_types"]:
        yield f"full_attention_interval {interval} does not give the layers that layer_types names"


def _ignored_keys(loader: Loader, config: Config) -> Iterator[str]:
    for key, value in loader.fixed.items():
        if config.get(key) is not None and config[key] != value:
            does = f"ignores {key}" if value is None else f"uses {key} {value}, not"
            yield f"it {does} {shown(config[key])}: outputs differ"


def _wrong_sizes(loader: Loader, config: Config) -> Iterator[str]:
    for left, right in loader.equal:
        products = [prod(config[field] for field in fields) for fields in (left, right)]
        if products[0] != products[1]:
            words = [" x ".join(f"{field} {config[field]}" for field in fields) for fields in (left, right)]
            yield f"it requires {words[0]} to equal {words[1]}"


def _mtp_problems(loader: Loader, checkpoint: CheckpointLike) -> list[str]:
    """List why the engine cannot draft with the MTP module; where there is none, its note on that."""
    if not checkpoint.has_mtp:
        return [loader.without_mtp] if loader.without_mtp else []
    if not loader.mtp:
        return ["it ignores the MTP module"]
    if loader.mtp_like_first_layer and checkpoint.config["mlp_layer_types"][0] == "dense":
        return ["the MTP module does not load: it is made dense, as layer 0 is"]
    specs = (spec for spec in checkpoint.specs.values() if spec.block.is_mtp)
    return [f"the MTP module does not load: {problem}" for problem in _without_place(loader.mtp, specs, {})]


def _without_place(names: Names, specs: Iterable[TensorSpec], unchecked: Mapping[str, str]) -> list[str]:
    """Describe the tensors that a loader has no place for: the first, and how many more."""
    known = tuple(unchecked)
    lost = [s for s in specs if _starred(s.block.prefix, s.pattern) not in names and not s.name.startswith(known)]
    if not lost:
        return []
    first = lost[0]
    more = f" and {len(lost) - 1:,} more" * (len(lost) > 1)
    stacked = any(spec.part == "routed_experts" and spec.expert is None for spec in lost)
    advice = " (write one tensor per expert: slimqwen prune --layout per_expert)" * stacked
    return [f"it has no place for '{first.name}' of shape {list(first.shape)}{more}{advice}"]


@cache
def _starred(prefix: str, pattern: str) -> str:
    """Replace every number in a tensor's name by `*`. Cached by block and pattern: an 80B checkpoint has 75,944 names."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", prefix + pattern.format(expert=0))
