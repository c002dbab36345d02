"""Formats of text files by their suffix, and reading of their bytes, compressed or not."""

import io
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any

from slimqwen.checkpoint.config import refuse_pointer
from slimqwen.recipe import TextFormat

OnRead = Callable[[int], None]  # called with the number of bytes after each read

PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc")
CODE = tuple(
    [
        ".py",
        ".pyi",
        ".pyx",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".cxx",
        ".hpp",
        ".hh",
        ".cu",
        ".cuh",
        ".cs",
        ".f90",
        ".go",
        ".hs",
        ".java",
        ".jl",
        ".js",
        ".jsx",
        ".kt",
        ".lua",
        ".m",
        ".ml",
        ".php",
        ".pl",
        ".r",
        ".rb",
        ".rs",
        ".scala",
        ".sh",
        ".sql",
        ".swift",
        ".ts",
        ".tsx",
        ".v",
        ".vhd",
        ".zig",
    ]
)
TABLES: dict[str, TextFormat] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
CODECS = {".gz": "gzip", ".zst": "zstd"}  # pyarrow's names for them
READ_IN_WORDS = (
    f"rows from {', '.join(TABLES)}, text from {', '.join(PROSE)} and source files such as .py, each also with "
    f"{' or '.join(CODECS)}"
)

READ_BYTES = 1 << 20
BOMS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16, and the first of UTF-32 too
UTF32_BOMS = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")


def format_of(name: str) -> TextFormat | None:
    """Return the format of a file of this name, ignoring the case of its suffix; None where it is not read."""
    suffix = PurePath(uncompressed(name)).suffix.lower()
    return TABLES.get(suffix, "text" if suffix in PROSE + CODE else None)


def is_prose(name: str) -> bool:
    """Return whether a file is text other than source code."""
    return PurePath(uncompressed(name)).suffix.lower() in PROSE


def uncompressed(name: str) -> str:
    """Return the name without the suffix of its compression."""
    path = PurePath(name)
    return name.removesuffix(path.suffix) if path.suffix.lower() in CODECS else name


def stem_of(name: str) -> str:
    """Return the name without the suffixes of its format: "wiki" of wiki.jsonl.gz, but "v1.2" of a folder v1.2."""
    if format_of(name) is None:
        return name
    plain = uncompressed(name)
    return plain.removesuffix(PurePath(plain).suffix)


def kind_of_special_file(path: Path) -> str | None:
    """Describe `path` where it is neither a regular file nor a folder. It is not opened, which could block."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "link to nothing" if path.is_symlink() else f"unreadable file ({error.strerror})"
    words = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return words.get(stat.S_IFMT(mode))


@contextmanager
def open_stream(path: Path, on_read: OnRead) -> Iterator[io.BufferedReader]:
    """Open a file, decompressed according to its suffix; `on_read` is called with the bytes read, as stored.

    Raises UserError for a git-lfs pointer.
    """
    refuse_pointer(path)
    with path.open("rb", buffering=0) as raw:
        counted: Any = _Counted(raw, on_read)
        stored = io.BufferedReader(counted, READ_BYTES)
        codec = CODECS.get(path.suffix.lower())
        if codec is None:
            yield stored
            return
        import pyarrow

        with pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, mode="r"), codec) as plain:
            yield io.BufferedReader(plain, READ_BYTES)


class _Counted(io.RawIOBase):
    """A file that reports how many of its bytes were read."""

    def __init__(self, file: IO[bytes], on_read: OnRead) -> None:
        self._file: Any = file
        self._on_read = on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size: int = self._file.readinto(buffer)
        self._on_read(size)
        return size


def is_utf16(beginning: bytes) -> bool:
    """Return whether bytes begin with a UTF-16 byte-order mark, or every other one is zero, as in UTF-16 of Latin text."""
    if beginning.startswith(BOMS):
        return True
    pairs = len(beginning) // 2
    return pairs > 1 and max(beginning[0 : 2 * pairs : 2].count(0), beginning[1 : 2 * pairs : 2].count(0)) > 0.4 * pairs


def why_not_utf8(content: bytes) -> str:
    """Describe bytes that are not UTF-8, by a guess at what they are."""
    if is_utf16(content[:4096]):
        return f"not UTF-8 but UTF-{32 if content.startswith(UTF32_BOMS) else 16}"
    return "not UTF-8 but binary" if b"\0" in content[:4096] else "not UTF-8 but latin-1, it seems"
