"""What the user of a checkpoint that loads should know: sizes that do not divide, words of config.json that are not true."""

from collections import Counter

import torch

from slimqwen.checkpoint.config import read_config
from slimqwen.checkpoint.reader import INDEX_FILE, Checkpoint
from slimqwen.core.errors import shown
from slimqwen.serving.requirements import size_caveats


def warnings_of(checkpoint: Checkpoint, tokens: int | None) -> list[str]:
    """One sentence each. tokens: size of the tokenizer's vocabulary, None where there is none."""
    return [*_of_files(checkpoint), *_of_tokens(checkpoint, tokens), *_of_sizes(checkpoint)]


def word_of(dtype: torch.dtype) -> str:
    """The dtype as config.json writes it."""
    return str(dtype).removeprefix("torch.")


def _of_files(checkpoint: Checkpoint) -> list[str]:
    """The index's total, the dtypes, the MTP module."""
    warnings = []
    total = sum(map(checkpoint.nbytes, checkpoint.specs))
    metadata = None if checkpoint.index is None else checkpoint.index.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said is not None and said != total:
        warnings.append(f"{INDEX_FILE} says total_size {shown(said)}, the tensors have {total:,} bytes.")
    sizes: Counter[str] = Counter()
    for name in checkpoint.specs:
        sizes[word_of(checkpoint.dtype(name))] += checkpoint.nbytes(name)
    if "float64" in sizes:
        warnings.append("some tensors are float64, which serving engines do not hold.")
    (usual, _), *_ = sizes.most_common(1)
    if not checkpoint.config.get("architectures"):
        warnings.append("config.json has no architectures, by which serving engines choose the model's code.")
    dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if dtype is not None and dtype != usual:
        warnings.append(
            f"config.json says dtype {shown(dtype)}, the weights are mostly {usual}: engines will convert them."
        )
    if read_config(checkpoint.folder)[1]["num_nextn_predict_layers"] and not checkpoint.has_mtp:
        warnings.append(
            "there is no MTP module, and config.json does not say so: engines cannot draft with it (write "
            "num_nextn_predict_layers 0)."
        )
    return warnings


def _of_tokens(checkpoint: Checkpoint, tokens: int | None) -> list[str]:
    rows = checkpoint.config["vocab_size"]
    if tokens is None or tokens <= rows:
        return []
    return [
        f"the tokenizer has {tokens:,} tokens, the embedding has {rows:,} rows: text with the others cannot be read."
    ]


def _of_sizes(checkpoint: Checkpoint) -> list[str]:
    """What the sizes and the layer pattern rule out, or make slow."""
    family, config = checkpoint.family, checkpoint.config
    warnings = size_caveats(family, config)
    if not family.attention_layers(config):
        warnings.append("no layer attends in full: Transformers cannot generate with a cache.")
    note = family.serving_note(config)
    return [*warnings, note] if note else warnings
