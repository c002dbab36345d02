r"""Safe terminal output: names and values from files are printed as data, never interpreted as terminal commands.

All output goes through this module or `slimqwen.core.progress.say`. Control characters, escape sequences and line breaks
inside a line are escaped (`\x1b`, `\n`), and so is a character that the terminal's encoding lacks.
"""

import io
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

Shown = TypeVar("Shown", bound=BaseModel)

# C0, DEL, C1 (some terminals read U+009B as ESC [), line separators, bidirectional controls, lone surrogates.
NOT_FOR_A_TERMINAL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
NOT_ASCII = re.compile(r"[^\x20-\x7e\n]")
PIPE_COLUMNS = 150  # assumed for a log file or pipe, which has no width to wrap a table at


def visible(text: str, *, keep: str = "") -> str:
    r"""Escape the control characters in `text`, such as `\x1b` for ESC; those in `keep` stay."""
    return NOT_FOR_A_TERMINAL.sub(lambda found: found[0] if found[0] in keep else _number(found[0]), text)


def _number(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def accept_every_character() -> None:
    """Make stdout and stderr escape characters that their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show(*lines: str) -> None:
    """Print lines to stdout."""
    for line in lines:
        print(visible(line, keep="\t"), flush=True)


def show_generated(text: str) -> None:
    """Print a piece of a model's text to stdout: unchanged to a file or pipe, escaped to a terminal."""
    print(visible(text, keep="\n\t") if sys.stdout.isatty() else text, end="", flush=True)


def show_json(text: str) -> None:
    """Print JSON to stdout in ASCII, which every terminal and every encoding can show and every parser reads alike."""
    print(NOT_ASCII.sub(_json_escape, text), flush=True)


def show_result(result: Shown, in_words: Callable[[Shown], str], as_json: bool) -> None:
    """Print a result to stdout as JSON, or as the lines that `in_words` returns."""
    if as_json:
        show_json(result.model_dump_json(indent=2))
    else:
        show(*in_words(result).split("\n"))


def _json_escape(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


class DataTable(Table):
    """A table whose headers, title and cells are plain text, never markup.

    columns: the headers. left: how many columns, from the first, hold text and are left-aligned; the others hold numbers.
    """

    def __init__(self, *columns: str, title: str | None = None, left: int = 1) -> None:
        super().__init__(
            title=None if title is None else Text(visible(title)), title_justify="left", box=None, pad_edge=False
        )
        for number, column in enumerate(columns):
            self.add_column(
                Text(visible(column)),
                justify="left" if number < left else "right",
                overflow="fold",
                min_width=max(map(len, column.split()), default=0),
            )
        self._left = left

    def add(self, *cells: str) -> None:
        """Append a row. Text wraps where the table is too narrow, numbers never do."""
        texts = [Text(visible(cell)) for cell in cells]
        for column, text in list(zip(self.columns, texts, strict=True))[self._left :]:
            column.min_width = max(column.min_width or 0, text.cell_len)
        self.add_row(*texts)

    def as_text(self, width: int) -> str:
        """Render the table in lines of at most `width` columns."""
        console = Console(width=width)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def show(self) -> None:
        """Print the table to stdout. On a terminal that is too narrow for its numbers the lines wrap."""
        pipe, terminal = Console(width=PIPE_COLUMNS), Console()
        least = pipe.measure(self).minimum + 2 * len(self.columns)  # and the space between them
        width = max(terminal.width, least) if terminal.is_terminal else PIPE_COLUMNS
        Console(width=width).print(self)
