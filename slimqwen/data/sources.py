"""Text as a stream of named documents, always in the same order.

A document's name decides whether it is held out, so it must not depend on the machine: it is a path relative to the
source's root, with forward slashes ("json/decoder.py"), and for a row of a table "<file>:<row>".

Tables are read with `json` and `pyarrow` rather than `datasets`, which cannot stream .jsonl whose later rows have
other keys than the first ones (CastError), takes brackets in a path for a pattern and leaves lock files in the
user's cache.
"""

import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from slimqwen.errors import UserError, did_you_mean
from slimqwen.recipe import BuiltinSource, Source

SUFFIXES = (".jsonl", ".md", ".parquet", ".py", ".txt")

# Folders of the built-in sources that are not read, at any depth.
EXCLUDED_FOLDERS = frozenset(
    {
        "site-packages",  # below the standard library: installed packages, which are a source of their own
        "dist-packages",  # Debian's name for it
        "__pycache__",
        "test",  # half of the standard library, present on some machines only
        "tests",
        "idle_test",
        "encodings",  # tables of characters
        "pydoc_data",  # one huge table of help topics
    }
)

BUILTIN_SOURCES = get_args(BuiltinSource)

OnSkip = Callable[[str, str], None]  # called with a document's name and why it was left out


@dataclass(frozen=True)
class Document:
    name: str
    text: str


def log_skipped(name: str, reason: str) -> None:
    logging.getLogger(__name__).warning("skipped %s: %s", name, reason)


def documents(source: Source, on_skip: OnSkip = log_skipped) -> Iterator[Document]:
    """The documents of `source`, sorted by file name and then by row, one at a time.

    Files below a folder are those that end in SUFFIXES; hidden ones and symbolic links are not read (what a link
    inside the folder points to is found under its own name, and what lies outside does not belong to the folder).
    Documents that are empty or not UTF-8 are left out and told to `on_skip`. With `keep_fraction` < 1 a share of the
    documents is kept, by a hash of the name that is independent of `is_heldout`.

    Raises `UserError`, when the iteration gets there: a missing path, an unreadable file, a table without the
    column `text_field`, a row that is not JSON, a source without any document.
    """
    check_source(source)
    files = _files(source)
    kept = 0
    for name, path in files:
        for document in _read(name, path, source.text_field, on_skip):
            if source.keep_fraction < 1.0 and _hash_fraction("weight\0" + document.name) >= source.keep_fraction:
                continue
            if not document.text.strip():
                on_skip(document.name, "empty")
                continue
            kept += 1
            yield document
    if not kept:
        wanted = f"no file ending in {', '.join(SUFFIXES)}" if not files else "no document with text"
        raise UserError(
            f"the data source {describe(source)} holds {wanted}: check its path, text_field and keep_fraction."
        )


def source_named(name: str, text_field: str = "text") -> Source:
    """A source from one word of a command line: the name of a built-in one, or a path."""
    if name in BUILTIN_SOURCES:
        return Source(builtin=name, text_field=text_field)
    return Source(path=Path(name), text_field=text_field)


def check_source(source: Source) -> None:
    """Raise `UserError` where the source's path does not exist: cheap, so that it can be asked before long work."""
    if source.path is not None and not source.path.exists():
        raise UserError(f"the data source {source.path} does not exist.")


def describe(source: Source) -> str:
    return source.builtin or str(source.path)


def is_heldout(name: str, fraction: float) -> bool:
    """Whether the document belongs to the held-out share: the same answer on every machine, for ever.

    sha256 of the name, its first 8 bytes as a big-endian integer over 2^64, is below `fraction`. Growing the fraction
    only adds documents.
    """
    return _hash_fraction(name) < fraction


def _hash_fraction(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _files(source: Source) -> list[tuple[str, Path]]:
    """(name, path) of every file of the source, sorted by name."""
    if source.builtin == "python-stdlib":
        found = _files_below(Path(sysconfig.get_path("stdlib")), (".py",), EXCLUDED_FOLDERS)
    elif source.builtin == "python-packages":
        found = {}
        for scheme in ("platlib", "purelib"):  # usually one folder; where they are two, purelib's file wins
            found |= _files_below(Path(sysconfig.get_path(scheme)), (".py",), EXCLUDED_FOLDERS)
    else:
        assert source.path is not None, "the recipe checks that a source has a path or is built in"
        found = (
            _files_below(source.path, SUFFIXES, frozenset())
            if source.path.is_dir()
            else {source.path.name: source.path}
        )
    return sorted(found.items())


def _files_below(root: Path, suffixes: tuple[str, ...], excluded_folders: frozenset[str]) -> dict[str, Path]:
    found = {}
    for folder, subfolders, files in os.walk(root, onerror=_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in excluded_folders]
        for file in files:
            path = Path(folder, file)
            if file.endswith(suffixes) and not file.startswith(".") and not path.is_symlink():
                found[path.relative_to(root).as_posix()] = path
    return found


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _read(name: str, path: Path, text_field: str, on_skip: OnSkip) -> Iterator[Document]:
    """The documents of one file; those without text come out empty."""
    try:
        if path.suffix == ".jsonl":
            yield from _jsonl_rows(name, path, text_field, on_skip)
        elif path.suffix == ".parquet":
            yield from _parquet_rows(name, path, text_field)
        else:
            yield Document(name, path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        on_skip(name, "not UTF-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _jsonl_rows(name: str, path: Path, text_field: str, on_skip: OnSkip) -> Iterator[Document]:
    with path.open("rb") as lines:
        for row, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                on_skip(f"{name}:{row}", "not UTF-8")
                continue
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {row + 1} is not JSON.") from error
            if not isinstance(value, dict):
                raise UserError(f"{path} line {row + 1} is not a JSON object with a field {text_field!r}.")
            if text_field not in value:
                raise _no_such_column(f"{path} line {row + 1}", text_field, list(value))
            text = _text_of_cell(value[text_field], f"{path} line {row + 1}", text_field)
            if not _encodable(text):  # JSON can spell half of a surrogate pair, "\ud800", which no UTF-8 text holds
                on_skip(f"{name}:{row}", "not UTF-8")
                continue
            yield Document(f"{name}:{row}", text)


def _parquet_rows(name: str, path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if text_field not in table.schema_arrow.names:
                raise _no_such_column(str(path), text_field, table.schema_arrow.names)
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    yield Document(f"{name}:{row}", _text_of_cell(value, f"{path} row {row}", text_field))
                    row += 1
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error}).") from error


def _text_of_cell(value: object, where: str, text_field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {text_field!r} holds {type(value).__name__}, not text: set text_field to the text's column."
        )
    return value


def _no_such_column(where: str, text_field: str, columns: list[str]) -> UserError:
    known = ", ".join(repr(column) for column in columns)
    return UserError(
        f"{where} has no column {text_field!r}{did_you_mean(text_field, columns)}; it has {known}: set text_field."
    )


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
