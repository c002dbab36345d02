"""Text from elsewhere, escaped for Markdown: it reads as what it is, and forms no heading, link, table cell or HTML."""

import re

from slimqwen.core.terminal import visible

WITH_A_MEANING = re.compile(r"[\\`*\[\]<>#!|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # a_b has no emphasis
RUN_OF_BACKTICKS = re.compile("`+")


def plain(text: str) -> str:
    """`text` as running text on one line."""
    return WITH_A_MEANING.sub(_escaped, visible(text))


def _escaped(found: re.Match[str]) -> str:
    # Backslashes are not enough in HTML, which some renderers read before Markdown.
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(found[0], "\\" + found[0])


def code(text: str) -> str:
    """`text` as a code span, which no backtick in it ends."""
    text = visible(text) or " "
    fence = _longer_than_any("", text)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def block(text: str, language: str) -> str:
    """Lines of `text` as a block of code, which no line in it ends."""
    fence = _longer_than_any("``", text)
    return f"{fence}{language}\n{visible(text, keep=chr(10))}\n{fence}"


def _longer_than_any(least: str, text: str) -> str:
    longest = max((len(run[0]) for run in RUN_OF_BACKTICKS.finditer(text)), default=0)
    return "`" * max(len(least) + 1, longest + 1)
