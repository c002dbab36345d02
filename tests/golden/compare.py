"""golden.json against what is made now, difference by difference, in words."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from golden.summary import Artefact, digest, digests, summarise

GOLDEN = Path(__file__).with_name("golden.json")
SHOWN = 5  # differing lines and vectors of an artefact
WHAT_TO_DO = (
    "A refactoring changes none of this. Where the change is meant, run `make golden`, commit tests/golden/golden.json "
    "with it, and say in the commit what differs and why."
)


def summaries(artefacts: Mapping[str, Artefact]) -> dict[str, Any]:
    """What golden.json holds of the artefacts."""
    return {
        name: {
            "lines": digests(artefact.lines),
            "numbers": {key: summarise(key, values) for key, values in artefact.numbers.items()},
        }
        for name, artefact in sorted(artefacts.items())
    }


def write(artefacts: Mapping[str, Artefact]) -> None:
    """Rewrite golden.json, a line for the digests of an artefact and one for each vector, so that a diff names what changed."""
    entries = []
    for name, held in summaries(artefacts).items():
        vectors = ",\n".join(f"  {json.dumps(key)}: {numbers}" for key, numbers in held["numbers"].items())
        entries.append(f'{json.dumps(name)}: {{"lines": "{held["lines"]}", "numbers": {{\n{vectors}\n}}}}')
    GOLDEN.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


def read() -> dict[str, Any]:
    golden: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return golden


def differences(golden: Mapping[str, Any], found: Mapping[str, Artefact]) -> list[str]:
    """One sentence or two for each artefact that is another than golden.json says; empty where none is."""
    said = [f"{name} is no longer made." for name in sorted(golden.keys() - found.keys())]
    said += [f"{name} is new: golden.json does not have it." for name in sorted(found.keys() - golden.keys())]
    for name in sorted(golden.keys() & found.keys()):
        said += of_lines(name, golden[name]["lines"].split(), found[name].lines)
        said += of_numbers(name, golden[name]["numbers"], found[name])
    return said


def of_lines(name: str, expected: list[str], lines: list[str]) -> list[str]:
    """What is said where there is no arithmetic: which lines golden.json does not have, and how many of its are gone."""
    found = [digest(line) for line in lines]
    if found == expected:
        return []
    left = Counter(expected)
    left.subtract(found)
    missing = sum(count for count in left.values() if count > 0)
    known = Counter(expected)
    new = []
    for line, code in zip(lines, found, strict=True):
        known[code] -= 1
        if known[code] < 0:
            new.append(line)
    if not new and not missing:
        return [f"{name}: its {len(lines)} lines are in another order."]
    shown = "".join(f"\n    {line}" for line in new[:SHOWN]) + ("\n    ..." if len(new) > SHOWN else "")
    return [f"{name}: lines new: {len(new)} of {len(lines)}, lines of golden.json gone: {missing}.{shown}"]


def of_numbers(name: str, expected: Mapping[str, list[float]], artefact: Artefact) -> list[str]:
    """Which vectors are farther from golden.json's than the tolerance, as a share of their norm."""
    far = []
    for key, values in artefact.numbers.items():
        if key not in expected:
            far.append((np.inf, f"{key} is new"))
            continue
        distance = distance_of(summarise(key, values), expected[key], len(values))
        if not distance <= artefact.tolerance:
            far.append((distance, f"{key} differs by {distance:.1e} of its norm"))
    far += [(np.inf, f"{key} is gone") for key in expected.keys() - artefact.numbers.keys()]
    if not far:
        return []
    far.sort(key=lambda pair: -pair[0])
    shown = "".join(f"\n    {sentence}" for _, sentence in far[:SHOWN]) + ("\n    ..." if len(far) > SHOWN else "")
    return [
        f"{name}: {len(far)} of {len(artefact.numbers)} vectors beyond the tolerance of {artefact.tolerance:.1e}:{shown}"
    ]


def distance_of(found: list[float], expected: list[float], length: int) -> float:
    """The largest difference of the summaries as a share of the vector's norm; the sum's may be sqrt(length) times as large."""
    if len(found) != len(expected):
        return float("inf")
    one, other = np.array(found), np.array(expected)
    difference = np.abs(one - other)
    if length <= 4:
        scale = float(np.linalg.norm(other))
    else:
        scale = float(other[0])
        difference[1] /= length**0.5
    if not np.isfinite(one).all():
        return float("inf")
    return float(difference.max() / scale) if scale else float(difference.max())
