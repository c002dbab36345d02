"""Strict parsing of safetensors headers: the name, dtype, shape and offsets of each tensor.

A file is 8 bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape, data_offsets), and the
tensors one after another (https://huggingface.co/docs/safetensors). It is parsed here too, because `safe_open`
accepts duplicate names and does not expose offsets. The 75,944 tensors of an 80B checkpoint take 0.7 s.
"""

import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from slimqwen.checkpoint.config import LARGEST_JSON_BYTES, parse_json, refuse_pointer
from slimqwen.core.errors import UserError, shown

LARGEST_SIZE = 1 << 63  # exclusive; of dimensions and offsets
MOST_DIMS = 64  # torch's own limit
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class Entry(NamedTuple):
    """A tensor as declared in its file's header, under its name there; `dtype` in safetensors' notation ("BF16")."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(file: Path) -> dict[str, Entry]:
    """Read the entries of all tensors of a file, by name.

    Raises UserError where the header is invalid, or does not describe the bytes that follow it: the tensors must cover
    them without gap or overlap, each with the length that its dtype and shape imply.
    """
    refuse_pointer(file)
    try:
        return _entries(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(
            f"{file} is not a readable safetensors file (corrupt or truncated?), {error}: download or write it again."
        ) from error


def _entries(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        if len(first) < 8:
            raise ValueError(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", first)
        if length > min(LARGEST_JSON_BYTES, size - 8):
            raise ValueError(f"its header claims {length} bytes, the file has {size}")
        header = parse_json(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    header.pop("__metadata__", None)
    spans, entries = [], {}
    for name, described in header.items():
        try:
            begin, end, entries[name] = _entry(file, name, described)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"its header describes {shown(name)} as {shown(described)}") from None
        spans.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            where = "overlaps the one before it" if begin < reached else "does not follow the one before it"
            raise ValueError(f"tensor {shown(name)} {where}")
        reached = end
    if reached != size - 8 - length:
        raise ValueError(f"its tensors take {reached} bytes, and {size - 8 - length} follow the header")
    return entries


def _entry(file: Path, name: str, described: Any) -> tuple[int, int, Entry]:
    """Return first byte, last byte + 1, and the entry. Raises KeyError, TypeError or ValueError for a wrong description."""
    dtype, shape, (begin, end) = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MOST_DIMS:
        raise ValueError("not a shape")
    if any(type(number) is not int or not 0 <= number < LARGEST_SIZE for number in (*shape, begin, end)):
        raise ValueError("not sizes")
    if 8 * (end - begin) != BITS[dtype] * prod(shape):
        raise ValueError("the offsets do not span the shape")
    return begin, end, Entry(file, name, dtype, tuple(shape), end - begin)
