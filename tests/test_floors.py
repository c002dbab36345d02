"""The rooms of the package, floor by floor: every import between two of them points down."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "slimqwen"
FLOORS = (  # from the top; a room imports from the floors below its own, and from no other room
    ("cli",),
    ("study", "search"),
    ("runs",),
    ("reporting", "depth", "healing"),
    ("training", "refit"),
    ("pruning",),
    ("planning",),
    ("calibration", "shapes", "evaluation", "teacher_cache"),
    ("layerwise", "serving", "generation", "parallel"),
    ("model", "data", "losses", "builtin"),
    ("checkpoint", "recipe"),
    ("artifacts", "families"),
    ("core",),
)
FLOOR = {room: number for number, rooms in enumerate(reversed(FLOORS), start=1) for room in rooms}
FACADE = ("slimqwen/__init__.py", "slimqwen/__main__.py")  # the names of the library, the command line
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())


def imported(source: str) -> set[str]:
    """The rooms that a module imports from, at its top or in a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("slimqwen.")}


def test_the_list_of_floors_names_every_room_once() -> None:
    listed = [room for rooms in FLOORS for room in rooms]
    assert sorted(listed) == ROOMS
    assert len(FLOORS) <= 13


def test_nothing_lies_loose_at_the_top_of_the_package() -> None:
    assert {f"slimqwen/{file.name}" for file in PACKAGE.glob("*.py")} == set(FACADE)


@pytest.mark.parametrize("room", ROOMS)
def test_every_import_between_rooms_points_down(room: str) -> None:
    upwards = {
        f"{file.relative_to(PACKAGE)} imports from {other}"
        for file in (PACKAGE / room).rglob("*.py")
        for other in imported(file.read_text()) - {room}
        if FLOOR[other] >= FLOOR[room]
    }
    assert not upwards


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_opens_with_a_sentence(room: str) -> None:
    opening = (ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or "").split("\n\n")[0]
    assert opening.endswith((".", ")"))
    assert len(opening.splitlines()) <= 2


def test_an_import_in_a_function_counts() -> None:
    assert imported("def f():\n    from slimqwen.cli import main\n    import slimqwen.data.store, numpy") == {
        "cli",
        "data",
    }
