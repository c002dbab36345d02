"""Command lines as version 0.1 had them: each does what its new spelling does, after one line of warning."""

import json
from pathlib import Path

import pytest
from test_cli import assert_one_sentence, slimqwen
from tiny import write_tiny_checkpoint, write_tiny_tokens

from slimqwen.cli.old_spellings import current_spelling


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/ and its tokens in data/tokens."""
    folder = tmp_path_factory.mktemp("old")
    tokenizer, _ = write_tiny_tokens(folder / "data")
    return write_tiny_checkpoint(folder / "teacher", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("repair s --teacher t --out o", "refit s --teacher t --out o"),
        ("plan c --fit total=1M", "plan fit c total=1M"),
        ("plan c --fit=total=1M --out t.yaml --json", "plan fit c --out t.yaml --json total=1M"),
        ("plan --align 4 --fit total=1M c", "plan fit --align 4 c total=1M"),
        (
            "plan c --fit total=1M --fit total=2M",
            "plan fit c total=2M",
        ),  # of an option that is given twice the last counts
        ("plan c --fit total=1M --gpus 4 --seed=1 --pick 2", "plan fit c --pick 2 total=1M"),  # had no effect
        ("plan c --fit total=1M --tokens t --seed 1 --gpus 4", "plan search c --tokens t --seed 1 total=1M"),
        ("plan c --fit total=1M --tokens=t --work w", "plan search c --tokens=t --work w total=1M"),
    ],
)
def test_an_old_spelling_has_a_new_one(old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert current_spelling(old.split()) == new.split()
    assert capsys.readouterr().err == f"`slimqwen {old}` is written `slimqwen {new}` since 0.2\n"


@pytest.mark.parametrize(
    "line", ["", "plan", "plan c --target t.yaml", "plan fit c total=1M", "run repair", "--version"]
)
def test_other_command_lines_stay_as_they_are(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert current_spelling(line.split()) == line.split()
    assert capsys.readouterr().err == ""


def test_a_warning_is_fit_for_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    current_spelling(["plan", "\x1b[31m", "--fit", "total=1M"])
    assert "\x1b" not in capsys.readouterr().err


def test_repair_is_refit(model: Path, tmp_path: Path) -> None:
    words = (
        model,
        "--teacher",
        model,
        "--tokens",
        tmp_path,
        "--plan",
        tmp_path / "plan.json",
        "--out",
        tmp_path / "out",
    )
    old, new = slimqwen("repair", *words), slimqwen("refit", *words)
    warning, _, message = old.stderr.partition("\n")
    assert warning.startswith("`slimqwen repair ") and "since 0.2" in warning
    assert (old.returncode, message) == (new.returncode, new.stderr) and old.returncode == 2
    assert "repair" not in slimqwen("--help").stdout
    assert_one_sentence(slimqwen("repai"), 2, "No such command 'repai'")


def test_plan_with_fit_lists_shapes_as_plan_fit_does(model: Path, tmp_path: Path) -> None:
    shapes = ("total=90000", "--align", 4, "--json")
    old = slimqwen("plan", model, "--fit", *shapes, "--gpus", 4, "--out", "old.yaml", cwd=tmp_path)
    new = slimqwen("plan", "fit", model, *shapes, "--out", "new.yaml", cwd=tmp_path)
    assert old.returncode == new.returncode == 0, old.stderr + new.stderr
    assert json.loads(old.stdout) == json.loads(new.stdout)
    assert (tmp_path / "old.yaml").read_bytes() == (tmp_path / "new.yaml").read_bytes()
    assert old.stderr.count("since 0.2") == 1 and "since 0.2" not in new.stderr


def test_plan_with_fit_and_tokens_is_plan_search(model: Path, tmp_path: Path) -> None:
    search = ("--fit", "total=1K", "--tokens", model.parent / "data" / "tokens", "--work", tmp_path / "work")
    assert_one_sentence(slimqwen("plan", model, *search), 2, "slimqwen plan search", "since 0.2", "can't be reached")


def test_plan_with_html_writes_the_page_and_shows_the_costs(model: Path, tmp_path: Path) -> None:
    old = slimqwen("plan", model, "--html", "old.html", "--json", cwd=tmp_path)
    new = slimqwen("plan", "page", model, "--out", "new.html", cwd=tmp_path)
    assert old.returncode == new.returncode == 0, old.stderr + new.stderr
    assert (tmp_path / "old.html").read_bytes() == (tmp_path / "new.html").read_bytes()
    assert json.loads(old.stdout) == json.loads(slimqwen("plan", model, "--json").stdout)
    assert old.stderr.count("is written `slimqwen plan page CONFIG --out PAGE` since 0.2") == 1
    assert "--html" not in slimqwen("plan", "--help").stdout
