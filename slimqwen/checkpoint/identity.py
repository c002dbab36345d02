"""What a checkpoint is made of, to recognise it again.

A folder may hold more than its model: a README, notes, a backup. What a stage reads of it counts, and nothing else: the
weights (`Checkpoint.fingerprint`), the tokenizer where there is text, and the companions where they are copied.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimqwen.artifacts import fingerprint, fingerprint_value
from slimqwen.checkpoint.config import parse_json

# By Transformers' names.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",  # what ends a document may stand here, and in config.json
    "config.json",
)

# What a tokenizer is made from: the first of these that is there.
VOCABULARY_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))


def tokenizer_fingerprint(checkpoint: Path) -> str:
    """Of all files that may have a say in how text becomes token ids, each by what it says."""
    files = [checkpoint / name for name in TOKENIZER_FILES]
    return fingerprint_value({file.name: content_fingerprint(file) for file in files if file.is_file()})


def content_fingerprint(file: Path) -> str:
    """Of a file by what it says: JSON however it is written down, another file byte by byte."""
    if file.name == "tokenizer.json":
        return _of_json(file, _canonical_tokenizer)
    return _of_json(file, lambda value: value) if file.suffix == ".json" else fingerprint(file)


def vocabulary_fingerprint(checkpoint: Path) -> str | None:
    """Of the tokenizer in a folder by what it says, however it is written down; None where there is none.

    Merges are pairs, which older files have as two words in one string. What a tokenizer was last asked to cut or pad
    to is stored with it and is no part of it: `tokenize` does neither.
    """
    for names in VOCABULARY_FILES:
        files = [checkpoint / name for name in names]
        if all(map(Path.is_file, files)):
            return fingerprint_value([content_fingerprint(file) for file in files])
    return None


def _canonical_tokenizer(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    value = {key: part for key, part in value.items() if key not in ("truncation", "padding")}
    model = value.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        value["model"] = model | {"merges": pairs}
    return value


def _of_json(file: Path, canonical: Callable[[Any], Any]) -> str:
    """Of the value; byte by byte where it is not JSON, whose damage another stage tells."""
    try:
        return fingerprint_value(canonical(parse_json(file.read_bytes())))
    except (ValueError, RecursionError):
        return fingerprint(file)
