"""Sources: text as a stream of named documents in a fixed order, and token ids made by other tools.

A document's name decides whether it is held out, so it must not depend on the machine: it is a path relative to the
source's root, with forward slashes ("json/decoder.py"), and for a row of a table "<file>:<row>".
"""

import hashlib
import logging
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.core.warning import warn
from slimqwen.data.chat import ChatTemplate
from slimqwen.data.documents import EMPTY, Document, LeftOut, OnSkip, Reading, printable, read_documents
from slimqwen.data.folder import Selection, raise_unreadable, select
from slimqwen.data.formats import READ_IN_WORDS, OnRead, format_of, kind_of_special_file, stem_of
from slimqwen.data.mixture import check_weights
from slimqwen.data.packed import bin_path, idx_path
from slimqwen.recipe import BuiltinSource, Source, TextFormat

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
    """Log a document that is left out."""
    logging.getLogger(__name__).warning("skipped %s: %s", name, reason)


def ignore_progress(read_bytes: int) -> None:
    """Do nothing with the bytes read: the default of `on_read`."""


def documents(
    source: Source,
    on_skip: OnSkip = log_skipped,
    on_read: OnRead = ignore_progress,
    *,
    chat: ChatTemplate | None = None,
    heldout: bool = False,
) -> Iterator[Document]:
    """Yield the documents of `source`, sorted by file name and then by row.

    `folder.select` chooses the files of a folder; a warning names those it skips. Documents that are empty or not UTF-8 are
    left out and passed to `on_skip`. With `keep_fraction` < 1 a share of the documents is kept, by a hash of the name
    that is independent of `is_heldout`. chat: renders rows of messages. heldout: whether the text is to be held out,
    which determines the split of a data set that is read.

    Raises `UserError`, when the iteration reaches it, for a missing path, an unreadable file, a table without the
    column `text_field`, a row that is not JSON, and a source without any document or without text.
    """
    check_source(source)
    if source.megatron is not None:
        raise UserError(f"the data source {describe(source)} is token ids, where text is needed: give a path.")
    selection = _select_files(source, heldout=heldout)
    note = selection.note(describe(source))
    if note is not None and selection.files:
        warn(printable(note))
    left_out, kept, unkept = LeftOut(), 0, 0

    def skip(name: str, reason: str) -> None:
        left_out.add(name, reason)
        on_skip(name, reason)

    reading = Reading(source.text_field, skip, on_read, chat)
    for name, path, text_format in selection.files:
        for document in read_documents(name, path, text_format, reading):
            if source.keep_fraction < 1.0 and _hash_fraction("weight\0" + document.name) >= source.keep_fraction:
                unkept += 1
            elif not document.text.strip():
                skip(document.name, EMPTY)
            else:
                kept += 1
                yield document
    if not kept:
        raise _no_document(source, selection, left_out, unkept)


def _no_document(source: Source, selection: Selection, left_out: LeftOut, unkept: int) -> UserError:
    """Return the error for a source without documents, with the reason."""
    where = f"the data source {describe(source)}"
    if not selection.files:
        note = selection.note(where)
        reasons = f" ({printable(note).removeprefix('note: ')})" if note else ""
        advice = "; the column is named by text_field" if "without a column" in reasons else ""
        return UserError(f"{where} holds no file that is read{reasons}: slimqwen reads {READ_IN_WORDS}{advice}.")
    if left_out.documents:
        advice = "convert it to UTF-8" if any(reason != EMPTY for reason in left_out.documents) else "add text"
        return UserError(f"{where} holds no document with text: {left_out}; {advice}.")
    if unkept:
        return UserError(f"keep_fraction {source.keep_fraction:g} keeps none of the {unkept:,} documents of {where}.")
    return UserError(f"{where} holds no document with text: its tables have no rows.")


def source_named(text: str, text_field: str = "text", text_format: TextFormat | None = None) -> Source:
    """Parse a source on the command line: NAME=SOURCE or SOURCE, which is a built-in one, a path, or Megatron's PREFIX."""
    name, named, word = text.partition("=")
    if not named or not NAME.fullmatch(name) or os.path.exists(text):  # a folder may be called lang=en
        name, word = "", text
    path = Path(word)
    origin: dict[str, Any] = {"path": path, "format": text_format}
    if word in BUILTIN_SOURCES:
        origin = {"builtin": word}
    elif not os.path.exists(path) and os.path.exists(idx_path(path)):
        origin = {"megatron": path}
    return Source(name=name or None, text_field=text_field, **origin)


def named_sources(
    words: Sequence[str], text_field: str, weights: Mapping[str, float], text_format: TextFormat | None = None
) -> list[Source]:
    """Parse the sources on the command line, with their weights by their names in the mixture.

    Raises `UserError` for a weight of an unknown source, or an invalid one.
    """
    sources = [source_named(word, text_field, text_format) for word in words]
    names = [name_of(source) for source in sources]
    for name in weights:
        if name not in names:
            raise UserError(
                f"data.sources.weight is given for '{name}'{did_you_mean(name, names)}; the sources are {', '.join(names)}."
            )
    check_weights(weights)
    return [s.model_copy(update={"weight": weights.get(name)}) for name, s in zip(names, sources, strict=True)]


def check_source(source: Source) -> None:
    """Raise `UserError` where the source's files do not exist or are not readable formats: a cheap check before long work."""
    name = str(source.path or source.megatron)
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"the name of the data source {printable(name)} is not UTF-8: rename it.") from None
    if source.path is not None:
        _check_path(source, source.path)
    if source.megatron is not None:
        for path in (idx_path(source.megatron), bin_path(source.megatron)):
            if not os.path.isfile(path):
                raise UserError(
                    f"the data source {describe(source)} has no {printable(path.name)}: give the common prefix of both files' names."
                )


def _check_path(source: Source, path: Path) -> None:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise UserError(f"the data source {describe(source)} does not exist.") from None
    except OSError as error:
        raise UserError(f"the data source {describe(source)} cannot be read: {error.strerror}.") from error
    special = kind_of_special_file(path)
    if special is not None:
        raise UserError(f"the data source {describe(source)} is a {special}: give a file or folder of text.")
    if path.is_file() and source.format is None and format_of(path.name) is None:
        raise UserError(
            f"the data source {describe(source)} has a suffix that is not read: slimqwen reads {READ_IN_WORDS}; "
            f"to read it anyway, name its format, one of {', '.join(map(repr, get_args(TextFormat)))}, as data.sources.format."
        )


def check_sources(sources: Sequence[Source], heldout_sources: Sequence[Source]) -> None:
    """Raise `UserError` where a source does not exist or the sources cannot be combined."""
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
            f"the data source {without} has no weight and others have one: give a data.sources.weight to all of them, or to none."
        )
    names = [name_of(source) for source in sources]
    for name in names:
        if not NAME.fullmatch(name) or name == "manifest.json":
            raise UserError(f"'{name}' cannot be a source's name in a mixture: give `name`, a word without '/'.")
        if names.count(name) > 1:
            raise UserError(f"two data sources are called '{name}': give them different names by `name`.")
    check_weights({name_of(source): source.weight for source in sources if source.weight is not None})
    if not heldout_sources and all(source.megatron is not None for source in sources):
        raise UserError(
            "all sources are token ids, of which nothing is held out: name held-out text in heldout_sources."
        )


def is_mixture(sources: Sequence[Source]) -> bool:
    """Return whether each source has files of its own: to be drawn by weight, or because its tokens exist already."""
    return any(source.weight is not None or source.megatron is not None for source in sources)


def name_of(source: Source) -> str:
    """Return the name of the source in a mixture: "wiki" for data/wiki and data/wiki.jsonl."""
    path = source.path or source.megatron
    if path is None:
        return source.name or source.builtin or ""
    return source.name or stem_of(path.name)


def describe(source: Source) -> str:
    """Return the source's name for messages."""
    return source.builtin or printable(str(source.path or source.megatron))


def size_bytes(source: Source, *, heldout: bool = False) -> int:
    """Return the size of all files of the source: the sum that `documents` passes to `on_read`, to within a few bytes."""
    files = (
        [bin_path(source.megatron)]
        if source.megatron is not None
        else [path for _, path in files_of(source, heldout=heldout)]
    )
    return sum(path.stat().st_size for path in files)


def is_heldout(name: str, fraction: float) -> bool:
    """Return whether the document belongs to the held-out share, on every machine alike.

    sha256 of the name, its first 8 bytes as a big-endian integer over 2^64, is below `fraction`. Growing the fraction
    only adds documents.
    """
    return _hash_fraction(name) < fraction


def _hash_fraction(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def files_of(source: Source, *, heldout: bool = False) -> list[tuple[str, Path]]:
    """List (name, path) of every file that is read of a source of text, sorted by name."""
    return [(name, path) for name, path, _ in _select_files(source, heldout=heldout).files]


def _select_files(source: Source, *, heldout: bool) -> Selection:
    if source.builtin is not None:
        # usually platlib and purelib are one folder; where they are two, purelib's file wins
        schemes = ("stdlib",) if source.builtin == "python-stdlib" else ("platlib", "purelib")
        found: dict[str, Path] = {}
        for scheme in schemes:
            found |= _python_files(Path(sysconfig.get_path(scheme)))
        return Selection([(name, path, "text") for name, path in sorted(found.items())])
    assert source.path is not None, "the recipe checks that a source has a path or is built in"
    if source.path.is_dir():
        return select(source, heldout=heldout)
    text_format = source.format or format_of(source.path.name)
    assert text_format is not None, "check_source has passed"
    return Selection([(source.path.name, source.path, text_format)])


def _python_files(root: Path) -> dict[str, Path]:
    """Find the .py files of an installation, by name; symbolic links are skipped, their targets are found by themselves."""
    found = {}
    for folder, subfolders, files in os.walk(root, onerror=raise_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in EXCLUDED_FOLDERS]
        for file in files:
            path = Path(folder, file)
            if file.endswith(".py") and not file.startswith(".") and not path.is_symlink():
                found[path.relative_to(root).as_posix()] = path
    return found
