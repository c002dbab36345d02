"""What golden.json holds of an artefact: of text the digest of each line, of numbers a norm, a sum and two projections."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

SHA256 = re.compile(r"\b[0-9a-f]{64}\b")


@dataclass
class Artefact:
    """One artefact: its lines where there is no arithmetic, and its numbers, each with the tolerance that it is compared by.

    Attributes:
        lines: compared exactly.
        numbers: name -> float64 vector, compared to within `tolerance`, a share of the vector's norm.
        tolerance: one of those of rounding.py, or a multiple.
    """

    lines: list[str] = field(default_factory=list)
    numbers: dict[str, Vector] = field(default_factory=dict)
    tolerance: float = 0.0


def digest(line: str) -> str:
    """Six hexadecimal digits of a line's sha256: enough that a change is not missed."""
    return hashlib.sha256(line.encode()).hexdigest()[:6]


def digests(lines: Iterable[str]) -> str:
    return " ".join(map(digest, lines))


def summarise(name: str, values: Vector) -> list[float]:
    """The norm, the sum, and the products with two vectors of random signs that the name determines; seven digits each.

    A change of the values by d changes the products by about the norm of d, however long the vector is. Up to four values are
    taken as they are.
    """
    if values.size <= 4:
        return [rounded(number) for number in values.tolist()]
    signs = random_signs(name, 2 * values.size).reshape(2, values.size)
    four = [float(np.linalg.norm(values)), float(values.sum()), *(signs @ values).tolist()]
    return [rounded(number) for number in four]


def rounded(number: float) -> float:
    """To seven digits, which is finer than any tolerance."""
    return float(f"{number:.7g}")


def random_signs(name: str, count: int) -> Vector:
    """`count` times 1 or -1, the same on every machine."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(name.encode()).digest(-(-count // 8)), dtype=np.uint8))
    return 1.0 - 2.0 * bits[:count]


def split_json(value: Any, hidden: Iterable[str] = ()) -> tuple[list[str], dict[str, Vector]]:
    """The leaves of a JSON value: those without arithmetic as lines `path: value`, floats as a vector per path.

    In the paths of floats the numbers of list entries are left out, so that a list is one vector. Paths that hold one of
    the words `hidden` are left out, and sha256s, which follow from other artefacts, read `<sha256>`.
    """
    lines: list[str] = []
    numbers: dict[str, list[float]] = {}

    def walk(path: str, value: Any) -> None:
        if any(word in path.split(".") for word in hidden):
            return
        if isinstance(value, Mapping) and value:
            for key, entry in value.items():
                walk(f"{path}.{key}" if path else str(key), entry)
        elif isinstance(value, list) and any(isinstance(entry, float | list | dict) for entry in value):
            for entry in value:
                walk(f"{path}[]", entry)
        elif isinstance(value, float):
            numbers.setdefault(path, []).append(value)
        else:
            lines.append(f"{path}: {SHA256.sub('<sha256>', json.dumps(value))}")

    walk("", value)
    lines += [f"{path}: {len(values)} numbers" for path, values in numbers.items()]
    return lines, {path: np.array(values) for path, values in numbers.items()}
