"""Rendering of a page from its template into one self-contained file."""

import base64
import gzip
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from slimqwen.artifacts import check_file_replaceable, write_text


def check_page(out: Path, *run_dirs: Path) -> None:
    """Raise UserError where the page would overwrite one of its inputs, or a file that slimqwen did not write."""
    inputs = [file for folder in run_dirs for file in folder.glob("*") if file.is_file() and file.suffix != ".html"]
    check_file_replaceable(out, *inputs)


def write_page(template: str, out: Path, **content: Any) -> None:
    """Render `template` to `out`, with plotly.js in it."""
    notice, library = plotly_library()
    write_text(out, render(template, **content, plotly_notice=notice, plotly_library=library))


def render(template: str, **content: Any) -> str:
    """Render `template` of this folder; all text in `content` is escaped, and a name that is not there is an error."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(template).render(**content)


@cache
def plotly_library() -> tuple[Markup, str]:
    """Return plotly.js from the installed package: its licence notice, and the whole as base64 of gzip.

    This makes 2.0 MB of 4.8 MB; every browser since 2023 can decompress it.
    """
    text = get_plotlyjs()
    notice = text[: text.index("*/") + 2]
    return Markup(notice), base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
