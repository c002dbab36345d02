"""Escaping of untrusted text for Markdown, so that it forms no heading, link, table cell or HTML."""

import re

from slimqwen.core.terminal import visible

SPECIAL = re.compile(r"[\\`*\[\]<>#!|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # a_b has no emphasis
RUN_OF_BACKTICKS = re.compile("`+")


def plain(text: str) -> str:
    """Escape `text` as running text on one line."""
    return SPECIAL.sub(_escape, visible(text))


def _escape(found: re.Match[str]) -> str:
    # Backslashes do not escape HTML, which some renderers parse before Markdown.
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(found[0], "\\" + found[0])


def code(text: str) -> str:
    """Format `text` as a code span that no backtick in it can end."""
    text = visible(text) or " "
    fence = _longer_than_any("", text)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def block(text: str, language: str) -> str:
    """Format lines of `text` as a code block that no line in it can end."""
    fence = _longer_than_any("``", text)
    return f"{fence}{language}\n{visible(text, keep=chr(10))}\n{fence}"


def _longer_than_any(least: str, text: str) -> str:
    longest = max((len(run[0]) for run in RUN_OF_BACKTICKS.finditer(text)), default=0)
    return "`" * max(len(least) + 1, longest + 1)
