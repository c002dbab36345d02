"""config.json of a checkpoint, or by itself; nothing here needs the weights, or torch."""

import json
from pathlib import Path
from typing import Any

from slimqwen.errors import UserError
from slimqwen.families import Config, Family, family_of


def read_json(path: Path) -> Any:
    """A JSON file, or one sentence about why it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error


def read_config(folder_or_file: Path) -> tuple[Family, Config]:
    """The family and the normalised config of a checkpoint folder, or of a config.json by itself."""
    path = folder_or_file / "config.json" if folder_or_file.is_dir() else folder_or_file
    if not path.exists():
        missing = (
            f"{folder_or_file} does not exist"
            if not folder_or_file.exists()
            else f"{folder_or_file} has no config.json"
        )
        raise UserError(f"{missing}: give the folder of a Hugging Face checkpoint.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a model config: its top level must be a mapping.")
    family = family_of(config, str(path))
    if config.get("quantization_config"):
        raise UserError(
            f"{path}: the checkpoint is quantised (quantization_config); slimqwen prunes bfloat16, float16 and float32 "
            "weights: use the original, unquantised checkpoint."
        )
    return family, family.normalise(config)
