"""Sizes in bytes, parsed from and formatted as text: "5GB", "12.3 GB"."""

import re

from slimqwen.core.errors import UserError, shown

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
LARGEST_BYTES = 10**15
BINARY_UNITS = {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def bytes_of(text: str) -> int:
    """Parse a size in bytes: "5GB" (decimal, as disks are sold), "512 MiB". Raises UserError."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = (UNITS | BINARY_UNITS | {"": 1}).get(match[2].upper()) if match else None
    size = round(float(match[1]) * unit) if match and unit else 0
    if not 0 < size <= LARGEST_BYTES:
        raise UserError(f"{shown(text)} is not a size in bytes: write it as 5GB, 500MB or 2GiB, at most 1000TB.")
    return size


def bytes_in_words(size: float, total: float | None = None) -> str:
    """Format a size as "850 B" or "12.3 MB"; with a total both in its unit: "12.3/160.0 GB"."""
    unit = next((unit for unit, one in UNITS.items() if (size if total is None else total) < 1000 * one), "TB")
    numbers = [f"{number / UNITS[unit]:.{0 if unit == 'B' else 1}f}" for number in (size, total) if number is not None]
    return f"{'/'.join(numbers)} {unit.replace('K', 'k')}"
