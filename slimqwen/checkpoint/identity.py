"""Fingerprints of a checkpoint's parts.

A folder may hold more than its model: a README, notes, a backup. Only what a stage reads counts: the weights
(`Checkpoint.fingerprint`), the tokenizer where there is text, and the companions where they are copied.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimqwen.artifacts import fingerprint, fingerprint_value
from slimqwen.checkpoint.config import parse_json

# Under Transformers' names.
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
    "generation_config.json",  # may define the token that ends a document, as may config.json
    "config.json",
)

# The files that define a tokenizer: the first of these sets that exists.
VOCABULARY_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))


def tokenizer_fingerprint(checkpoint: Path) -> str:
    """Hash the content of all files that may influence how text is tokenized."""
    files = [checkpoint / name for name in TOKENIZER_FILES]
    return fingerprint_value({file.name: content_fingerprint(file) for file in files if file.is_file()})


def content_fingerprint(file: Path) -> str:
    """Hash a file's content: JSON by its values, regardless of formatting, any other file byte by byte."""
    if file.name == "tokenizer.json":
        return _of_json(file, _canonical_tokenizer)
    return _of_json(file, lambda value: value) if file.suffix == ".json" else fingerprint(file)


def vocabulary_fingerprint(checkpoint: Path) -> str | None:
    """Hash the tokenizer in a folder by its values, regardless of formatting; None where there is none.

    Merges are pairs, which older files store as two words in one string. Settings of truncation and padding are stored
    with a tokenizer but ignored here: `tokenize` uses neither.
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
    """Hash the JSON value; byte by byte where it is not JSON, which is reported when the file is used."""
    try:
        return fingerprint_value(canonical(parse_json(file.read_bytes())))
    except (ValueError, RecursionError):
        return fingerprint(file)
