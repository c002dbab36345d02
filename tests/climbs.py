"""Counts the calls by which a recipe climbs: handed, whole or in part, from a function to one in a higher room.

`python tests/climbs.py` prints those of a tiny run, each pair of functions once.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from test_floors import FLOOR, PACKAGE

from slimqwen.recipe import Section


@cache
def _room(filename: str) -> str | None:
    """The room that a file lies in; None outside of the package, and in its face."""
    try:
        inside = Path(filename).relative_to(PACKAGE).parts
    except ValueError:
        return None
    return inside[0] if len(inside) > 1 else None


def room_of(frame: FrameType) -> str | None:
    return _room(frame.f_code.co_filename)


def caller_of(frame: FrameType) -> FrameType | None:
    """The nearest frame of the package above, whatever library lies between."""
    above = frame.f_back
    while above is not None and room_of(above) is None:
        above = above.f_back
    return above


def holds_settings(frame: FrameType) -> bool:
    """Whether a call has a section of a recipe among its arguments or, for a closure, what it closes over."""
    return any(isinstance(value, Section) for value in frame.f_locals.values())


@contextmanager
def climbs() -> Iterator[set[tuple[str, str]]]:
    """Collect (caller, callee) of every call within the block that hands a recipe's settings up."""
    found: set[tuple[str, str]] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or (room := room_of(frame)) is None or room == "recipe":
            return
        above = caller_of(frame)
        if above is not None and FLOOR[str(room_of(above))] < FLOOR[room] and holds_settings(frame):
            found.add((_named(above), _named(frame)))

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)


def _named(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()
    return f"{file}:{frame.f_code.co_qualname}"


def climbs_of(action: Callable[[], object]) -> list[tuple[str, str]]:
    """The climbs of one call, in alphabetical order."""
    with climbs() as found:
        action()
    return sorted(found)


if __name__ == "__main__":
    import tempfile

    from test_pipeline import tiny_recipe

    from slimqwen.runs.recipe_run import run

    with tempfile.TemporaryDirectory() as folder:
        recipe = tiny_recipe(Path(folder), Path(folder) / "run")
        for caller, callee in climbs_of(lambda: run(recipe)):
            print(f"{caller} -> {callee}")
