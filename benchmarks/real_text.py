"""Real text of three kinds for the real teacher: English prose, Python source and documentation; each with its held-out part.

A hash of a document's name decides whether it is held out, so that no held-out document is ever trained or calibrated on.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from slimqwen.artifacts import atomic_folder
from slimqwen.core.errors import UserError
from slimqwen.data.documents import Document
from slimqwen.data.sources import documents, is_heldout
from slimqwen.recipe import Source

KINDS = ("home", "python", "docs")
HELDOUT_FRACTION = 0.2
TITLE = re.compile(r"(?m)^ ?= ([^=\n]+) = ?$")  # of an article in WikiText; sections have two or more
KEPT_FRACTION = {"python-stdlib": 0.3, "python-packages": 0.1}  # 0.6 and 0.5 million tokens
SHORTEST_CHARACTERS = 1_000  # of a module's documentation


def write_text(prose: Path, folder: Path) -> None:
    """Write `folder`/KIND-train.jsonl and KIND-heldout.jsonl, a document per row. prose: an English text in WikiText's form.

    Raises UserError where the prose is not a file with at least two titles.
    """
    found = {"home": articles(prose), "python": python_source(), "docs": documentation()}
    with atomic_folder(folder) as partial:
        for kind, named in found.items():
            with (
                (partial / f"{kind}-train.jsonl").open("w", encoding="utf-8") as train,
                (partial / f"{kind}-heldout.jsonl").open("w", encoding="utf-8") as heldout,
            ):
                for document in named:
                    stream = heldout if is_heldout(document.name, HELDOUT_FRACTION) else train
                    stream.write(json.dumps({"name": document.name, "text": document.text}) + "\n")


def articles(prose: Path) -> Iterator[Document]:
    """Yield the articles of a WikiText file, each with its title."""
    try:
        text = prose.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{prose} cannot be read as text ({error}): give the validation split of WikiText.") from error
    starts = [found.start() for found in TITLE.finditer(text)]
    if len(starts) < 2:
        raise UserError(f"{prose} has no lines ' = Title = ' that separate articles: give WikiText's text.")
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        article = text[start:end].strip()
        yield Document(article.partition("\n")[0].strip(" ="), article)


def python_source() -> Iterator[Document]:
    """Yield modules of the interpreter's standard library."""
    return documents(Source(builtin="python-stdlib", keep_fraction=KEPT_FRACTION["python-stdlib"]))


def documentation() -> Iterator[Document]:
    """Yield the docstrings, in order, of each module installed beside slimqwen that has at least 1,000 characters of them."""
    for module in documents(Source(builtin="python-packages", keep_fraction=KEPT_FRACTION["python-packages"])):
        text = "\n\n".join(docstrings(module.text))
        if len(text) >= SHORTEST_CHARACTERS:
            yield Document(module.name, text)


def docstrings(source: str) -> list[str]:
    """Return the docstrings of a module, its classes and its functions; none where it is not valid Python."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in third-party code
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    except (SyntaxError, ValueError, RecursionError):
        return []
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]
