"""Command lines as version 0.1 had them: each is accepted for one release, with a warning that has the new spelling."""

import shlex
from itertools import pairwise

from slimqwen.core.terminal import visible
from slimqwen.core.warning import warn

SINCE = "0.2"
COMMANDS = {"repair": "refit"}

# `plan --fit BUDGETS` ignored options that belong to other work of `plan`; each of these takes a value.
COSTS = ("--context-length", "--gpus", "--micro-batch-size")
SEARCH = (
    "--work",
    "--shapes",
    "--measured-tokens",
    "--samples",
    "--sequence-length",
    "--seed",
    "--device",
    "--dtype",
)


def current_spelling(words: list[str]) -> list[str]:
    """Return the words of a command line as they are spelled now, and warn where that differs."""
    new = _spelled_now(words)
    if new != words:
        warn_of_old(_line(words), _line(new))
    return new


def warn_of_old(old: str, new: str) -> None:
    """Print the warning that a command line has a new spelling."""
    warn(f"`{old}` is written `{new}` since {SINCE}")


def _spelled_now(words: list[str]) -> list[str]:
    if words[:1] == ["plan"] and _values(words, "--fit"):
        return _fit(words[1:])
    return [COMMANDS.get(words[0], words[0]), *words[1:]] if words else words


def _fit(words: list[str]) -> list[str]:
    """Return `plan fit CHECKPOINT BUDGETS ...`, or with --tokens `plan search CHECKPOINT BUDGETS ...`."""
    command, ignored = ("search", COSTS) if _values(words, "--tokens") else ("fit", COSTS + SEARCH)
    *_, budgets = _values(words, "--fit")
    return ["plan", command, *_without(words, ("--fit", *ignored)), budgets]


def _values(words: list[str], option: str) -> list[str]:
    """Return the values that an option has: `--fit VALUE` or `--fit=VALUE`."""
    values = []
    for word, following in pairwise([*words, ""]):
        if word == option:
            values.append(following)
        elif word.startswith(f"{option}="):
            values.append(word.partition("=")[2])
    return values


def _without(words: list[str], options: tuple[str, ...]) -> list[str]:
    """Return the words without some options and their values."""
    kept: list[str] = []
    is_value = False
    for word in words:
        if not is_value and word.partition("=")[0] not in options:
            kept.append(word)
        is_value = not is_value and word in options
    return kept


def _line(words: list[str]) -> str:
    return visible(shlex.join(["slimqwen", *words]))
