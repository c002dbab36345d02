"""What decides the last bits of sums on a CPU beside the work itself, and the warning where that has changed."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from slimqwen.artifacts import rewrite_text
from slimqwen.checkpoint.config import read_json
from slimqwen.core.errors import UserError
from slimqwen.core.warning import warn


def arithmetic() -> dict[str, Any]:
    """Return threads, vector instructions and release of PyTorch: with the same ones the same work gives the same bits."""
    return {
        "format": "slimqwen.arithmetic/1",
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": version("torch"),
    }


def keep_arithmetic(file: Path, what: str) -> None:
    """Write the present arithmetic to `file`, of a working folder, and warn where it was another when that was last written."""
    try:
        earlier = read_json(file) if file.exists() else None
    except UserError:  # damaged: nothing is known
        earlier = None
    warn_of_other_arithmetic(earlier, what)
    rewrite_text(file, json.dumps(arithmetic()) + "\n")


def warn_of_other_arithmetic(earlier: object, what: str) -> None:
    """Warn where `what` was begun with another `arithmetic` than the present one. Without a record of it nothing is printed."""
    now = arithmetic()
    if isinstance(earlier, dict) and _is_known(earlier, now) and any(earlier[key] != now[key] for key in now):
        warn(
            f"note: {what} was begun with {_in_words(earlier)} and goes on with {_in_words(now)}: the rest is equal to an "
            "uninterrupted run's up to rounding, which training magnifies, and not to the bit."
        )


def _is_known(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether `earlier` has all of it, in words that may stand on a terminal."""
    return all(type(earlier.get(key)) is type(now[key]) and str(earlier[key]).isprintable() for key in now)


def _in_words(values: Mapping[str, Any]) -> str:
    """Return it in words: `2 threads, AVX2, torch 2.13.0`."""
    threads = values["threads"]
    return f"{threads} thread{'' if threads == 1 else 's'}, {values['instructions']}, torch {values['torch']}"
