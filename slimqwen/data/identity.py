"""Identity of tokenised text: the settings, tokenizer and files that it was made from."""

import platform
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from slimqwen.artifacts import fingerprint
from slimqwen.checkpoint.identity import tokenizer_fingerprint
from slimqwen.data.packed import bin_path, idx_path
from slimqwen.data.sources import files_of
from slimqwen.recipe import DataRecipe, Source

# Bytes read of one file for its fingerprint, so that terabytes take seconds: a file up to this size is read whole.
MOST_BYTES = 8 << 20


def text_identity(data: DataRecipe, tokenizer: Path) -> dict[str, Any]:
    """Return fingerprints of the tokenizer in the folder `tokenizer` and of the text that `data` names."""
    return {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "python": platform.python_version(),  # determines the text of 'python-stdlib'
        "packages": _installed_packages() if any(s.builtin == "python-packages" for s in data.sources) else None,
        "text": text_contents(data),
    }


def _installed_packages() -> list[str]:
    return sorted(f"{d.metadata['Name']} {d.version}" for d in distributions())


def text_contents(data: DataRecipe) -> list[list[list[str]]]:
    """Return the name and fingerprint of every file that is read of each source that is not built in.

    By content, not by modification time: a touched or copied file is the same, and a changed one differs
    even where size and time are kept. Of a file over MOST_BYTES its size and 128 samples of 64 KiB at equal
    distances are hashed, both ends included; a change between them that keeps the size goes undetected.
    """
    sources = [(source, False) for source in data.sources] + [(source, True) for source in data.heldout_sources]
    return [_contents(source, heldout=heldout) for source, heldout in sources if source.builtin is None]


def _contents(source: Source, *, heldout: bool) -> list[list[str]]:
    if source.megatron is not None:
        files = [(path.name, path) for path in (bin_path(source.megatron), idx_path(source.megatron))]
    else:
        files = files_of(source, heldout=heldout)
    return [[name, fingerprint(path, most_bytes=MOST_BYTES)] for name, path in files]
