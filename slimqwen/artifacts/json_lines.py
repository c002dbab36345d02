"""Append-only files of JSON lines. Lines that are not ours are preserved byte for byte."""

import json
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from slimqwen.artifacts import alone, rewrite_bytes
from slimqwen.core.regular_files import read_regular


def read_lines(path: Path) -> list[bytes]:
    """Read the lines of a file, each with its newline (which the last one may lack); none where there is no file.

    Raises OSError where it is not a regular file.
    """
    return BytesIO(read_regular(path)).readlines() if path.exists() else []


def value_of(line: bytes) -> dict[str, Any] | None:
    """Parse a line as a JSON object; None for any other line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def append(path: Path, value: Mapping[str, Any]) -> None:
    """Append a line. Where the last line lacks its newline, one is inserted first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def keep_lines(path: Path, is_kept: Callable[[bytes], bool]) -> None:
    """Remove the lines that are not to be kept, in one rename; if there are none, the file is not touched.

    A process that appends while another may call this must hold the file's lock (`artifacts.alone`).
    """
    if not all(map(is_kept, read_lines(path))):
        with alone(path, wait=True):
            rewrite_bytes(path, b"".join(line for line in read_lines(path) if is_kept(line)))


def is_cut_short(line: bytes, first_key: str) -> bool:
    """Return whether a line of ours, whose first key is `first_key`, is incomplete, as after kill -9."""
    beginning = f'{{"{first_key}": '.encode()
    is_ours = line.startswith(beginning) or beginning.startswith(line)
    return is_ours and not line.endswith(b"\n") and value_of(line) is None
