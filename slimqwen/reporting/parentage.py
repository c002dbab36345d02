"""Fields that the model card inherits from the teacher: its name on the hub, licence and language.

All of them are optional, and read before a run: one that cannot be read causes a warning, not a failure.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from slimqwen.checkpoint.config import read_json
from slimqwen.core.errors import UserError, shown
from slimqwen.core.terminal import NOT_FOR_A_TERMINAL
from slimqwen.core.warning import warn

LARGEST_CARD_BYTES = 1_000_000
LONGEST_VALUE = 500  # characters
KNOWN = ("license", "license_name", "license_link", "language")
NOTHING = ("", "~", "null", "Null", "NULL")  # how YAML writes that there is no value


@dataclass(frozen=True)
class Parentage:
    """The fields inherited from the teacher. base_model: its name on the hub, None if unknown. inherited: from its card."""

    base_model: str | None = None
    inherited: dict[str, Any] = field(default_factory=dict)


def parentage_of(teacher: Path) -> Parentage:
    """Read the fields that the card of a model made from the checkpoint in `teacher` inherits; warns of invalid ones."""
    return Parentage(hub_name(teacher), inherited(teacher))


def hub_name(teacher: Path) -> str | None:
    """Find the teacher's name on the hub, by its path in the hub's cache or by config.json's _name_or_path."""
    cached = [part.split("--") for part in teacher.resolve().parts if part.startswith("models--")]
    if cached and len(cached[-1]) == 3:
        return "/".join(cached[-1][1:])
    try:
        config = read_json(teacher / "config.json")
    except UserError:
        return None
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((".", "/")) or not _is_plain(name):
        return None
    return name


def inherited(teacher: Path) -> dict[str, Any]:
    """Read the licence and language in the teacher's own card, which apply to models made from it."""
    card = teacher / "README.md"
    try:
        if not card.is_file():
            return {}
        with card.open("rb") as stream:
            content = stream.read(LARGEST_CARD_BYTES)
        front = _front_matter(content)
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        warn(f"note: the model card will not name the teacher's licence and language: {card} {_shorten(reason)}.")
        return {}
    found = {key: front[key] for key in KNOWN if key in front and front[key] not in NOTHING}
    for key in [key for key, value in found.items() if not _is_value(value)]:
        warn(f"note: the model card will not name the teacher's {key}: {card} has {shown(found.pop(key))[:80]} there.")
    return found


def _front_matter(content: bytes) -> dict[str, Any]:
    """Parse the mapping between the first two lines `---`, with every scalar as text (`no` is Norwegian, not false).

    Empty without such lines. Raises ValueError where it is invalid.
    """
    try:
        text = content.decode("utf-8-sig", errors="strict" if len(content) < LARGEST_CARD_BYTES else "ignore")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from None
    lines = text.lstrip().splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((number for number, line in enumerate(lines[1:], start=1) if line.rstrip() == "---"), None)
    if end is None:
        return {}
    try:
        front = yaml.load("\n".join(lines[1:end]), yaml.BaseLoader)  # constructs only text, lists and mappings
    except yaml.YAMLError as error:
        raise ValueError(f"has front matter that is not valid YAML ({_shorten(str(error))})") from None
    except RecursionError:
        raise ValueError("has front matter that is nested too deep") from None
    return front if isinstance(front, dict) else {}


def _is_value(value: object) -> bool:
    """Return whether it is text, or a list of texts, as these fields are."""
    return _is_plain(value) or (isinstance(value, list) and 0 < len(value) <= 1000 and all(map(_is_plain, value)))


def _is_plain(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_VALUE and NOT_FOR_A_TERMINAL.search(value) is None


def _shorten(text: str) -> str:
    return " ".join(text.split())[:200]
