"""What tokenised text was made from, to recognise it again."""

import platform
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from slimqwen.artifacts import fingerprint
from slimqwen.data.packed import bin_path, idx_path
from slimqwen.data.tokenize import FIELDS_WITHOUT_EFFECT
from slimqwen.recipe import DataRecipe, Source


def text_identity(data: DataRecipe, tokenizer: Path) -> dict[str, Any]:
    """The settings, the tokenizer in the folder `tokenizer`, and the state of the text itself."""
    return {
        "data": data.model_dump(mode="json", exclude=FIELDS_WITHOUT_EFFECT),
        "tokenizer": fingerprint(tokenizer / "tokenizer.json"),
        "python": platform.python_version(),  # whose standard library 'python-stdlib' is
        "packages": _installed_packages() if any(s.builtin == "python-packages" for s in data.sources) else None,
        "text": [_text_state(source) for source in (*data.sources, *data.heldout_sources) if source.builtin is None],
    }


def _installed_packages() -> list[str]:
    return sorted(f"{d.metadata['Name']} {d.version}" for d in distributions())


def _text_state(source: Source) -> list[list[Any]]:
    """Names, sizes and times of the files of a source: reading terabytes to see that they are unchanged is too much."""
    if source.megatron is not None:
        files = [bin_path(source.megatron), idx_path(source.megatron)]
    else:
        assert source.path is not None
        files = [source.path] if source.path.is_file() else sorted(p for p in source.path.rglob("*") if p.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
