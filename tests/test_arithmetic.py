"""Work that goes on with another number of threads, or on another machine, says that its bits are no longer promised."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slimqwen.model.arithmetic import arithmetic, keep_arithmetic


@pytest.fixture
def threads() -> Iterator[int]:
    """The number of threads, whatever the test makes of it."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_the_same_again_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        keep_arithmetic(tmp_path / "arithmetic.json", "the work")
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "arithmetic.json").read_text()) == arithmetic()


def test_another_number_of_threads_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: int
) -> None:
    keep_arithmetic(tmp_path / "arithmetic.json", "the work")
    torch.set_num_threads(threads + 1)
    for said in (True, False):
        keep_arithmetic(tmp_path / "arithmetic.json", "the work")
        line = capsys.readouterr().err
        assert (f"the work was begun with {threads} thread" in line) is said
        assert (f"goes on with {threads + 1} threads" in line) is said


def test_another_processor_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "arithmetic.json").write_text(json.dumps(arithmetic() | {"instructions": "VSX"}))
    keep_arithmetic(tmp_path / "arithmetic.json", "the work")
    assert ", VSX, torch" in capsys.readouterr().err


@pytest.mark.parametrize("instructions", [None, 5, "\x1b[2J"])
def test_what_tells_nothing_is_no_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], instructions: object
) -> None:
    """Nor does what a file holds that is not ours reach the terminal."""
    (tmp_path / "arithmetic.json").write_text(json.dumps(arithmetic() | {"threads": 99, "instructions": instructions}))
    keep_arithmetic(tmp_path / "arithmetic.json", "the work")
    assert capsys.readouterr().err == ""
