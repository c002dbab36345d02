"""What a reader can hold: the length of files and functions, and how many parameters a function takes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "slimqwen"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
FILE_LINES, FUNCTION_LINES, PARAMETERS = 350, 60, 8
KERNELS = "losses/triton_kernels.py"
IN_EVERY_STAGE = ("execution", "title")  # how a stage works and what it shows: not counted, as every stage takes them


def functions(source: str) -> Iterator[tuple[str, int, int]]:
    """Name, lines and parameters (self, cls and those of every stage not counted) of every function of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert node.end_lineno is not None
            yield (
                node.name,
                node.end_lineno - node.lineno + 1,
                len([name for name in given if name not in ("self", "cls", *IN_EVERY_STAGE)]),
            )


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_stay_short(file: str) -> None:
    source = (PACKAGE / file).read_text()
    assert len(source.splitlines()) <= FILE_LINES
    assert {name: lines for name, lines, _ in functions(source) if lines > FUNCTION_LINES} == {}


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith(("cli/", KERNELS))])
def test_functions_take_few_parameters(file: str) -> None:
    """But for commands, whose parameters are the options of the command line, and Triton's kernels, which take no objects."""
    source = (PACKAGE / file).read_text()
    assert {name: count for name, _, count in functions(source) if count > PARAMETERS} == {}


def test_a_long_function_and_a_greedy_one_are_seen() -> None:
    source = "class A:\n    def f(self, a, b, *, c, execution):\n" + "        pass\n" * 9
    assert list(functions(source)) == [("f", 10, 3)]
