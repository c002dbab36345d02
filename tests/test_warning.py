"""Warnings: said, and kept with the step that said them for as long as it is made from the same."""

import json
import multiprocessing
from pathlib import Path

import pytest

from slimqwen.artifacts.warning_file import kept_in
from slimqwen.core.warning import warn
from slimqwen.reporting.run_folder import LoggedWarning
from slimqwen.runs.record import Steps


def kept(path: Path) -> list[tuple[str, str]]:
    lines = [LoggedWarning.model_validate_json(line) for line in path.read_text().splitlines()]
    return [(line.step, line.text) for line in lines]


def test_said_and_kept_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run" / "warnings.jsonl"
    warn("before")
    with kept_in(path, step="distil", key="a"):
        warn("slow é")
        warn("slow é")
        with kept_in(path, step="carry", key="b"):  # a step within a step
            warn("inner")
        warn("loss nan")
    warn("after")
    assert kept(path) == [("distil", "slow é"), ("carry", "inner"), ("distil", "loss nan")]
    assert capsys.readouterr().err.splitlines() == ["before", "slow é", "slow é", "inner", "loss nan", "after"]


def test_nothing_to_keep_leaves_no_file(tmp_path: Path) -> None:
    with kept_in(tmp_path / "warnings.jsonl", step="a", key="a"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_step_that_continues_keeps_its_own_and_one_made_from_something_else_does_not(tmp_path: Path) -> None:
    path = tmp_path / "warnings.jsonl"
    with pytest.raises(KeyboardInterrupt), kept_in(path, step="distil", key="a"):
        warn("step 3 is bad")
        raise KeyboardInterrupt
    with kept_in(path, step="plan", key="a"):
        warn("a note")
    with kept_in(path, step="distil", key="a"):
        warn("step 3 is bad")  # the same step again, from the last saved state
        warn("step 9 is bad")
    assert kept(path) == [("distil", "step 3 is bad"), ("plan", "a note"), ("distil", "step 9 is bad")]
    with path.open("a") as stream:
        stream.write('{"step": "distil", "key": "a", "te')  # cut short by kill -9
    with kept_in(path, step="distil", key="b"):
        pass
    assert kept(path) == [("plan", "a note")]


def test_a_step_of_a_run_keeps_what_it_is_warned_of(tmp_path: Path) -> None:
    steps, out = Steps(tmp_path, "test"), tmp_path / "out"

    def make() -> None:
        warn("it is slow")
        out.write_text("made")

    for _ in range(2):  # done, then skipped
        steps.step("make", out, {"from": 1}, make)
        assert kept(tmp_path / "warnings.jsonl") == [("make", "it is slow")]
    assert json.loads((tmp_path / "warnings.jsonl").read_text())["key"]


def _warn_often(path: Path, number: int) -> None:
    for round_ in range(8):
        with kept_in(path, step=f"step {number}", key=str(round_)):  # each time made from something else
            warn(f"{number}: round {round_}")


def test_processes_that_share_a_file_lose_nothing_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "warnings.jsonl"
    path.write_bytes(b"somebody's line\n")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_warn_often, args=(path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines.count(b"somebody's line\n") == 1 and len(lines) == 4
    found = {json.loads(line)["text"] for line in lines if line.startswith(b"{")}
    assert found == {f"{number}: round 7" for number in range(3)}
    assert [file.name for file in tmp_path.iterdir()] == ["warnings.jsonl"]
