"""Warnings about a checkpoint that loads: sizes that do not divide evenly, and wrong values in config.json."""

from collections import Counter

import torch

from slimqwen.checkpoint.config import read_config
from slimqwen.checkpoint.reader import INDEX_FILE, Checkpoint
from slimqwen.core.errors import shown
from slimqwen.serving.requirements import size_caveats


def find_warnings(checkpoint: Checkpoint, tokens: int | None) -> list[str]:
    """List warnings, one sentence each. tokens: size of the tokenizer's vocabulary, None where there is no tokenizer."""
    return [*_check_files(checkpoint), *_check_vocabulary(checkpoint, tokens), *_check_sizes(checkpoint)]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name as in config.json."""
    return str(dtype).removeprefix("torch.")


def _check_files(checkpoint: Checkpoint) -> list[str]:
    """Check the index's total, the dtypes, and the MTP module."""
    warnings = []
    total = sum(map(checkpoint.nbytes, checkpoint.specs))
    metadata = None if checkpoint.index is None else checkpoint.index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated is not None and stated != total:
        warnings.append(f"{INDEX_FILE} has total_size {shown(stated)}, but the tensors have {total:,} bytes.")
    sizes: Counter[str] = Counter()
    for name in checkpoint.specs:
        sizes[dtype_name(checkpoint.dtype(name))] += checkpoint.nbytes(name)
    if "float64" in sizes:
        warnings.append("some tensors are float64, which serving engines do not support.")
    (usual, _), *_ = sizes.most_common(1)
    if not checkpoint.config.get("architectures"):
        warnings.append("config.json has no architectures, by which serving engines choose the model's code.")
    dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if dtype is not None and dtype != usual:
        warnings.append(
            f"config.json has dtype {shown(dtype)}, but the weights are mostly {usual}: engines will convert them."
        )
    if read_config(checkpoint.folder)[1]["num_nextn_predict_layers"] and not checkpoint.has_mtp:
        warnings.append(
            "config.json declares an MTP module that the checkpoint lacks: engines cannot draft with it (set "
            "num_nextn_predict_layers to 0)."
        )
    return warnings


def _check_vocabulary(checkpoint: Checkpoint, tokens: int | None) -> list[str]:
    rows = checkpoint.config["vocab_size"]
    if tokens is None or tokens <= rows:
        return []
    return [
        f"the tokenizer has {tokens:,} tokens, but the embedding only {rows:,} rows: text with the other tokens cannot be read."
    ]


def _check_sizes(checkpoint: Checkpoint) -> list[str]:
    """List the uses that the sizes and the layer pattern rule out, or make slow."""
    family, config = checkpoint.family, checkpoint.config
    warnings = size_caveats(family, config)
    if not family.attention_layers(config):
        warnings.append("no layer has full attention: Transformers cannot generate with a cache.")
    note = family.serving_note(config)
    return [*warnings, note] if note else warnings
