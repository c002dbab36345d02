"""Matching of stored tensors with the family's table: other prefixes are removed, tensors that no loader reads dropped.

It accepts what Transformers and vLLM accept, and records every deviation in `Match.notes`. A tensor that is missing, has
another shape, or is a weight that config.json does not account for is an error (`Checkpoint`).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from slimqwen.checkpoint.header import Entry
from slimqwen.core.errors import UserError, shown
from slimqwen.families import Config, Family
from slimqwen.families.family import Layout, TensorSpec

ROOTS = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")
"""Prefixes of a language model's layers in various programs; "" where the model was saved without its head."""
PROGRAM_PREFIXES = ("_orig_mod.", "module.")  # of every name, where the saved model was wrapped by torch.compile or DDP
BELOW_ROOT = ("embed_tokens.", "layers.", "norm.")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
WRAPPED_HEAD = "language_model.lm_head.weight"
VISION_PREFIXES = ("model.visual.", "visual.")

# Recomputed by loaders from the config: RoPE tables, causal masks, counters of positions and batches.
BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.\w*(inv_freq|cos_cached|sin_cached)|\w*attn\.(masked_)?bias|position_ids|num_batches_tracked)$"
)
COUNTER_DTYPES = ("I64", "I32", "U64", "U32", "BOOL")
WEIGHT_DTYPES = ("F32", "F16", "BF16", "F64")
# Names of the tensors that accompany a quantised one: FP8, GPTQ and AWQ, compressed-tensors, bitsandbytes.
QUANTISED_NAMES = (
    *(".weight_scale_inv", ".weight_scale", ".input_scale", ".qweight", ".qzeros", ".scales", ".g_idx"),
    *(".weight_packed", ".weight_zero_point", ".SCB", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"),
)

Read = Callable[[Entry], Tensor]


class Match(NamedTuple):
    """The result of `match`. entries: table name -> stored tensor. notes: one sentence for each deviation."""

    family: Family
    config: Config
    layouts: dict[str, Layout]
    specs: dict[str, TensorSpec]
    entries: dict[str, Entry]
    notes: list[str]


def match(folder: Path, family: Family, config: Config, stored: Mapping[str, Entry], read: Read) -> Match:
    """Find a family's tensors among the stored ones. `read` loads a tensor, to compare a stored head with the embedding."""
    notes: list[str] = []
    for prefix in PROGRAM_PREFIXES:
        if all(name.startswith(prefix) for name in stored):
            stored = {name.removeprefix(prefix): entry for name, entry in stored.items()}
    if family.language_model is not None and not any(name.startswith(VISION_PREFIXES) for name in stored):
        family, config = family.language_model(config)
        notes.append(
            f"{folder} has no vision tower: it is read as the language model alone ({family.model_type}), and so are the "
            "models made from it."
        )
    entries = _under_root(family, config, stored)
    config = family.as_found(config, entries.keys())
    embedding = entries.get(_root(family, config) + EMBEDDING)
    config = _tied_as_found(folder, config, entries, embedding, read, notes)
    layouts = family.detect_layouts(config, set(entries))
    # A config may claim billions of experts. At twice the number of stored tensors, most are missing anyway.
    claimed = islice(family.tensors(config, layouts), 2 * len(entries) + 1)
    specs = {spec.name: spec for spec in claimed}
    _refuse_quantised(folder, entries, specs)
    for kind, names in _leftovers(family, config, entries, specs).items():
        for name in names:
            del entries[name]
        notes.append(f"{folder}: left out {kind} ({first_names(names)}).")
    return Match(family, config, layouts, specs, entries, notes)


def _under_root(family: Family, config: Config, stored: Mapping[str, Entry]) -> dict[str, Entry]:
    """Rename the stored tensors to the names in the table."""
    root = _root(family, config)
    found = next((other for other in (root, *ROOTS) if other + EMBEDDING in stored), root)
    renamed: dict[str, Entry] = {}
    for name, entry in stored.items():
        ours = HEAD if name == WRAPPED_HEAD and HEAD not in stored else name
        if family.language_model is not None and name.startswith("visual."):
            ours = f"model.{name}"
        elif found != root and name.startswith(tuple(found + below for below in BELOW_ROOT)):
            ours = root + name.removeprefix(found)
        renamed[name if ours in stored or ours in renamed else ours] = entry
    return renamed


def _root(family: Family, config: Config) -> str:
    """Return the table's prefix of the embedding and the layers."""
    embeddings = (name for block in family.surroundings(config) for name in block.tables.get("embedding", {}))
    return next(name for name in embeddings if name.endswith(EMBEDDING)).removesuffix(EMBEDDING)


def _tied_as_found(
    folder: Path, config: Config, entries: dict[str, Entry], embedding: Entry | None, read: Read, notes: list[str]
) -> Config:
    """Resolve a head that is stored although config.json ties it: dropped where it equals the embedding, else untied."""
    if not config["tie_word_embeddings"] or HEAD not in entries:
        return config
    if embedding is not None and _are_equal(entries[HEAD], embedding, read):
        del entries[HEAD]
        notes.append(f"{folder}: left out {HEAD}, a copy of the embedding that config.json ties it to.")
        return config
    notes.append(
        f"{folder}: config.json ties {HEAD} to the embedding, but the stored one differs: it is read untied, as by "
        "Transformers (vLLM uses the embedding)."
    )
    return config | {"tie_word_embeddings": False}


def _are_equal(one: Entry, other: Entry, read: Read) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape) or one.dtype not in WEIGHT_DTYPES or len(one.shape) != 2:
        return False
    pairs = zip(read(one).split(4096), read(other).split(4096), strict=True)
    return all(bool((mine == theirs).all()) for mine, theirs in pairs)


def _refuse_quantised(folder: Path, entries: Mapping[str, Entry], specs: Mapping[str, TensorSpec]) -> None:
    is_whole = specs.keys() <= entries.keys()
    for name, entry in entries.items():
        is_counter = entry.dtype in COUNTER_DTYPES and name not in specs and is_whole
        if name.endswith(QUANTISED_NAMES) or (
            entry.dtype not in WEIGHT_DTYPES and not is_counter and not BUFFERS.search(name)
        ):
            raise UserError(
                f"{folder} is quantised ({shown(name)} is {entry.dtype}); slimqwen reads bfloat16, float16 and "
                "float32 weights: use the original, unquantised checkpoint."
            )


def _leftovers(
    family: Family, config: Config, entries: Mapping[str, Entry], specs: Mapping[str, TensorSpec]
) -> dict[str, list[str]]:
    """Group the stored tensors that no loader reads by kind."""
    unknown = [name for name in entries if name not in specs]
    mtp = family.mtp_names(config, unknown) if not config["num_nextn_predict_layers"] else set()
    has_vision = any(spec.part == "vision" for spec in specs.values())
    kinds: dict[str, list[str]] = {}
    for name in unknown:
        if name in mtp:
            kind = "an MTP module, which config.json declares absent"
        elif name.startswith(VISION_PREFIXES) and not has_vision:
            kind = "a vision tower, which this model_type does not have"
        elif BUFFERS.search(name):
            kind = "buffers that are computed from config.json"
        elif entries[name].dtype in COUNTER_DTYPES:
            kind = "whole numbers that are not weights"
        else:
            continue
        kinds.setdefault(kind, []).append(name)
    return kinds


def first_names(names: Iterable[str]) -> str:
    """Join the first three names for a message."""
    first = list(islice(names, 4))
    return ", ".join(shown(name)[1:-1] for name in first[:3]) + (", ..." if len(first) > 3 else "")
