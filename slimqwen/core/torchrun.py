"""The environment variables that torchrun, or another launcher, sets for each process."""

import os

from slimqwen.core.errors import UserError


def world_size() -> int:
    """Return the number of processes (WORLD_SIZE); 1 where it is not set."""
    return _number("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """Return the index of this process among all processes (RANK), from 0."""
    number = _number("RANK", 0)
    if number >= world_size() > 1:
        raise UserError(
            f"RANK is {number} and WORLD_SIZE {world_size()}: ranks count from 0, start the command with torchrun."
        )
    return number


def local_rank() -> int | None:
    """Return the index of this process on its machine (LOCAL_RANK); None where it was started without a launcher."""
    return _number("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else None


def local_world_size() -> int:
    """Return the number of processes on this machine (LOCAL_WORLD_SIZE); all of them where it is not set."""
    return _number("LOCAL_WORLD_SIZE", world_size(), least=1)


def _number(name: str, default: int, *, least: int = 0) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < least:
        raise UserError(
            f"the variable {name} is {text[:40]!r}, where torchrun sets a whole number of at least {least}: unset it, or "
            "start the command with torchrun."
        )
    return int(text)
