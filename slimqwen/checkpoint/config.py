"""Reading of config.json, from a checkpoint or by itself, without the weights and without torch."""

import json
from collections import Counter
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from slimqwen.checkpoint.folder import explain_folder
from slimqwen.core.errors import UserError, shown
from slimqwen.families import Config, Family, family_of

POINTER = b"version https://git-lfs.github.com/spec/"  # the beginning of a git-lfs pointer, in place of a large file
QUANTISATION_KEYS = ("quantization_config", "compression_config")
# How one program loaded the model, or where code is that is never run: not properties of the model.
RUNTIME_KEYS = (
    *("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("_attn_implementation_autoset", "_experts_implementation", "experts_implementation"),
    *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "torchscript", *QUANTISATION_KEYS),
)
DTYPE_KEYS = ("dtype", "torch_dtype")
DEEPEST_NESTING = 32  # of a config.json; real ones need 4
LARGEST_JSON_BYTES = 100_000_000  # safetensors' own limit for a header; the index of an 80B checkpoint has 7 MB


def read_json(path: Path) -> Any:
    """Read a JSON file strictly (`parse_json`). Raises UserError where it cannot be read."""
    refuse_pointer(path)
    try:
        if path.stat().st_size > LARGEST_JSON_BYTES:
            raise UserError(f"{path} is too large for a file of its kind: over {LARGEST_JSON_BYTES:,} bytes.")
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error


def refuse_pointer(path: Path) -> None:
    """Raise UserError where a file is a git-lfs pointer to the actual content."""
    try:
        with path.open("rb") as stream:
            is_pointer = stream.read(len(POINTER)) == POINTER
    except OSError:  # reported when the file is read
        return
    if is_pointer:
        raise UserError(
            f"{path} is a git-lfs pointer and not the file itself: run `git lfs pull` in its folder, or download it again."
        )


def parse_json(text: bytes) -> Any:
    """Parse strict JSON. Raises ValueError for anything else, also NaN, infinity, duplicate keys and too deep nesting."""
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_refuse
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {shown(name)} twice")
    return mapping


def _finite(digits: str) -> float:
    return float(digits) if isfinite(float(digits)) else _refuse(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it has a number that is not finite, {shown(constant)}")


class ParsedConfig(NamedTuple):
    """The content of a config.json. notes: one sentence about each key that was left out."""

    family: Family
    config: Config
    notes: list[str]


def read_config(folder_or_file: Path) -> tuple[Family, Config]:
    """Read the family and the canonical config of a checkpoint folder, or of a config.json by itself.

    Raises UserError where it is not the config.json of a family, is quantised, or has impossible sizes.
    """
    parsed = read_config_with_notes(folder_or_file)
    return parsed.family, parsed.config


def read_config_with_notes(folder_or_file: Path) -> ParsedConfig:
    """Read a config like `read_config`, with notes about what was left out."""
    path = folder_or_file / "config.json" if folder_or_file.is_dir() else folder_or_file
    if not path.is_file():
        if not folder_or_file.exists():
            raise UserError(f"{folder_or_file} does not exist: give the folder of a Hugging Face checkpoint.")
        advice = explain_folder(folder_or_file) or "give the folder of a Hugging Face checkpoint."
        raise UserError(f"{folder_or_file} has no config.json: {advice}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a model config: its top level must be a mapping.")
    if _depth_exceeds(config, DEEPEST_NESTING):
        raise UserError(f"{path} is not a model config: it is nested more than {DEEPEST_NESTING} deep.")
    family = family_of(config, str(path))
    _check_values(config, path)
    left_out = {key: section[key] for section in sections(config) for key in RUNTIME_KEYS if section.get(key)}
    notes = [f"{path}: left out {', '.join(left_out)}, which is not a property of the model."] if left_out else []
    try:
        canonical = family.normalise(drop_runtime_keys(config))
        family.sizes(canonical)
        family.to_disk(canonical)  # so that a config that cannot be written fails now, not after the work
    except UserError as error:
        raise UserError(f"{folder_or_file}: {error}") from error
    return ParsedConfig(family, canonical, notes)


def _check_values(config: Config, path: Path) -> None:
    """Raise UserError for a quantised checkpoint, and for values of the wrong type."""
    for section in sections(config):
        if any(section.get(key) for key in QUANTISATION_KEYS):
            raise UserError(
                f"{path}: the checkpoint is quantised (quantization_config); slimqwen prunes bfloat16, float16 and float32 "
                "weights: use the original, unquantised checkpoint."
            )
        for key in QUANTISATION_KEYS:
            if not isinstance(section.get(key), dict | None):
                raise UserError(f"{path}: '{key}' must be a mapping or left out, is {shown(section[key])}.")
        for key in DTYPE_KEYS:
            if not isinstance(section.get(key), str | None):
                raise UserError(
                    f"{path}: '{key}' must be the name of a dtype, such as 'bfloat16', is {shown(section[key])}."
                )


def drop_runtime_keys(on_disk: Config) -> Config:
    """Copy a config.json without RUNTIME_KEYS, at the top level and in its sections."""
    return {
        key: {inner: entry for inner, entry in value.items() if inner not in RUNTIME_KEYS}
        if isinstance(value, dict)
        else value
        for key, value in on_disk.items()
        if key not in RUNTIME_KEYS
    }


def sections(on_disk: Config) -> list[Config]:
    """List a config.json and the mappings in it: multimodal models keep the language model's fields in `text_config`."""
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
