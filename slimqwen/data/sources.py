"""Sources: text as a stream of named documents, always in the same order, and token ids made elsewhere.

A document's name decides whether it is held out, so it must not depend on the machine: it is a path relative to the
source's root, with forward slashes ("json/decoder.py"), and for a row of a table "<file>:<row>".
"""

import hashlib
import logging
import math
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from slimqwen.data.documents import Document, OnRead, OnSkip, read_documents
from slimqwen.data.packed import bin_path, idx_path
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

NAME = re.compile(r"\w[\w.-]*")  # of a source in a mixture: its folder's name


def log_skipped(name: str, reason: str) -> None:
    logging.getLogger(__name__).warning("skipped %s: %s", name, reason)


def untold(read_bytes: int) -> None:
    """Where nobody wants to know how far it is."""


def documents(source: Source, on_skip: OnSkip = log_skipped, on_read: OnRead = untold) -> Iterator[Document]:
    """The documents of `source`, sorted by file name and then by row, one at a time.

    Files below a folder are those that end in SUFFIXES; hidden ones and symbolic links are not read (what a link
    inside the folder points to is found under its own name, and what lies outside does not belong to the folder).
    Documents that are empty or not UTF-8 are left out and told to `on_skip`. With `keep_fraction` < 1 a share of the
    documents is kept, by a hash of the name that is independent of `is_heldout`.

    Raises `UserError`, when the iteration gets there: a missing path, an unreadable file, a table without the
    column `text_field`, a row that is not JSON, a source without any document or without text at all.
    """
    check_source(source)
    if source.megatron is not None:
        raise UserError(f"the data source {source.megatron} is token ids, where text is needed: give a path.")
    files = files_of(source)
    kept = 0
    for name, path in files:
        for document in read_documents(name, path, source.text_field, on_skip, on_read):
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


def source_named(text: str, text_field: str = "text") -> Source:
    """A source from one word of a command line: NAME=SOURCE or SOURCE, a built-in one, a path, or Megatron's PREFIX."""
    name, named, word = text.partition("=")
    if not named or not NAME.fullmatch(name) or Path(text).exists():  # a folder may be called lang=en
        name, word = "", text
    path = Path(word)
    origin: dict[str, Any] = {"path": path}
    if word in BUILTIN_SOURCES:
        origin = {"builtin": word}
    elif not path.exists() and idx_path(path).exists():
        origin = {"megatron": path}
    return Source(name=name or None, text_field=text_field, **origin)


def named_sources(words: Sequence[str], text_field: str, weights: Mapping[str, float]) -> list[Source]:
    """The sources of a command line with their weights, which are by the names that they have in a mixture.

    Raises `UserError` for a weight of no source, or one that is no share.
    """
    sources = [source_named(word, text_field) for word in words]
    names = [name_of(source) for source in sources]
    for name, weight in weights.items():
        if name not in names:
            raise UserError(
                f"there is a weight for '{name}'{did_you_mean(name, names)}; the sources are {', '.join(names)}."
            )
        if not 0.0 < weight < math.inf:
            raise UserError(f"the weight of '{name}' must be positive, not {weight:g}.")
    return [s.model_copy(update={"weight": weights.get(name)}) for name, s in zip(names, sources, strict=True)]


def check_source(source: Source) -> None:
    """Raise `UserError` where the source's files do not exist: cheap, so that it can be asked before long work."""
    if source.path is not None and not source.path.exists():
        raise UserError(f"the data source {source.path} does not exist.")
    if source.megatron is not None:
        for path in (idx_path(source.megatron), bin_path(source.megatron)):
            if not path.is_file():
                raise UserError(
                    f"the data source {source.megatron} has no {path}: give what both files' names begin with."
                )


def check_sources(sources: Sequence[Source], heldout_sources: Sequence[Source]) -> None:
    """Raise `UserError` where the sources do not exist or do not go together."""
    for source in (*sources, *heldout_sources):
        check_source(source)
    for source in heldout_sources:
        if source.megatron is not None or source.weight is not None:
            raise UserError(
                f"the held-out source {describe(source)} must be text, and has no weight: all of it is held out."
            )
    if not is_mixture(sources):
        return
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        without = describe(sources[weighted.index(False)])
        raise UserError(
            f"the data source {without} has no weight and others have one: give all of them weights, or none."
        )
    names = [name_of(source) for source in sources]
    for name in names:
        if not NAME.fullmatch(name) or name == "manifest.json":
            raise UserError(f"'{name}' cannot be a source's name in a mixture: give `name`, a word without '/'.")
        if names.count(name) > 1:
            raise UserError(f"two data sources are called '{name}': tell them apart by `name`.")
    if not heldout_sources and all(source.megatron is not None for source in sources):
        raise UserError(
            "all sources are token ids, of which nothing is held out: name held-out text in heldout_sources."
        )


def is_mixture(sources: Sequence[Source]) -> bool:
    """Whether each source is kept apart, to be drawn from by weight or because its tokens are there already."""
    return any(source.weight is not None or source.megatron is not None for source in sources)


def name_of(source: Source) -> str:
    """What the source is called in a mixture: "wiki" for data/wiki and data/wiki.jsonl."""
    path = source.path or source.megatron
    if path is None:
        return source.name or source.builtin or ""
    return source.name or (path.stem if path.suffix in SUFFIXES else path.name)


def describe(source: Source) -> str:
    return source.builtin or str(source.path or source.megatron)


def size_bytes(source: Source) -> int:
    """Of all files of the source: what `documents` will tell `on_read` in the end, but for a few bytes."""
    files = [bin_path(source.megatron)] if source.megatron is not None else [path for _, path in files_of(source)]
    return sum(path.stat().st_size for path in files)


def is_heldout(name: str, fraction: float) -> bool:
    """Whether the document belongs to the held-out share: the same answer on every machine, for ever.

    sha256 of the name, its first 8 bytes as a big-endian integer over 2^64, is below `fraction`. Growing the fraction
    only adds documents.
    """
    return _hash_fraction(name) < fraction


def _hash_fraction(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def files_of(source: Source) -> list[tuple[str, Path]]:
    """(name, path) of every file that is read of a source of text, sorted by name."""
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
