"""config.json of a checkpoint, or by itself; nothing here needs the weights, or torch."""

import json
from collections import Counter
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from slimqwen.errors import UserError, shown
from slimqwen.families import Config, Family, family_of

QUANTISATION_KEYS = ("quantization_config", "compression_config")
DEEPEST_NESTING = 32  # of a config.json; real ones need 4
LARGEST_JSON_BYTES = 100_000_000  # safetensors' own limit for a header; the index of an 80B checkpoint has 7 MB


def read_json(path: Path) -> Any:
    """A JSON file, or one sentence about why it cannot be read."""
    try:
        if path.stat().st_size > LARGEST_JSON_BYTES:
            raise UserError(f"{path} is too large to be what it should: over {LARGEST_JSON_BYTES:,} bytes.")
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error


def parse_json(text: bytes) -> Any:
    """Strict JSON. Raises ValueError for all else: NaN and infinity, a key given twice, nesting without end."""
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_twins, parse_float=_finite, parse_constant=_refused
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {shown(name)} twice")
    return mapping


def _finite(digits: str) -> float:
    return float(digits) if isfinite(float(digits)) else _refused(digits)


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"it has a number that is not finite, {shown(constant)}")


def read_config(folder_or_file: Path) -> tuple[Family, Config]:
    """The family and the canonical config of a checkpoint folder, or of a config.json by itself.

    Raises UserError for whatever is no config.json of a family, is quantised, or has sizes that cannot be.
    """
    path = folder_or_file / "config.json" if folder_or_file.is_dir() else folder_or_file
    if not path.is_file():
        missing = (
            f"{folder_or_file} does not exist"
            if not folder_or_file.exists()
            else f"{folder_or_file} has no config.json"
        )
        raise UserError(f"{missing}: give the folder of a Hugging Face checkpoint.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a model config: its top level must be a mapping.")
    if _depth_exceeds(config, DEEPEST_NESTING):
        raise UserError(f"{path} is not a model config: it is nested more than {DEEPEST_NESTING} deep.")
    family = family_of(config, str(path))
    if any(section.get(key) for section in sections(config) for key in QUANTISATION_KEYS):
        raise UserError(
            f"{path}: the checkpoint is quantised (quantization_config); slimqwen prunes bfloat16, float16 and float32 "
            "weights: use the original, unquantised checkpoint."
        )
    try:
        canonical = family.normalise(config)
        family.sizes(canonical)
        family.to_disk(canonical)  # what could not be written again is told now, not after the work
    except UserError as error:
        raise UserError(f"{folder_or_file}: {error}") from error
    return family, canonical


def sections(on_disk: Config) -> list[Config]:
    """A config.json and the mappings in it: multimodal models keep the language model's fields in `text_config`."""
    return [on_disk, *(value for value in on_disk.values() if isinstance(value, dict))]


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)
