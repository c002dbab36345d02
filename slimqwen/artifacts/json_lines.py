"""Files of JSON lines that grow as work goes on. They may hold lines of others, which stay as they are, byte for byte."""

import json
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from slimqwen.artifacts import alone, rewrite_bytes
from slimqwen.core.regular_files import read_regular


def read_lines(path: Path) -> list[bytes]:
    """Each with the newline that ends it, which the last one may lack; none where there is no file.

    Raises OSError for what is no regular file.
    """
    return BytesIO(read_regular(path)).readlines() if path.exists() else []


def value_of(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line is; None for any other line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def append(path: Path, value: Mapping[str, Any]) -> None:
    """Add a line. Where the last one is not ended, the new one still begins a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def keep_lines(path: Path, is_kept: Callable[[bytes], bool]) -> None:
    """Take the other lines out, in one rename; where none is taken out the file is not touched.

    Who appends while another process may do this holds the file meanwhile (`artifacts.alone`).
    """
    if not all(map(is_kept, read_lines(path))):
        with alone(path, wait=True):
            rewrite_bytes(path, b"".join(line for line in read_lines(path) if is_kept(line)))


def is_cut_short(line: bytes, first_key: str) -> bool:
    """Whether kill -9 left only the beginning of a line of ours, whose first key is `first_key`."""
    beginning = f'{{"{first_key}": '.encode()
    is_ours = line.startswith(beginning) or beginning.startswith(line)
    return is_ours and not line.endswith(b"\n") and value_of(line) is None
