"""Each command's outputs: what it must not write over or into is refused at once, before anything is read or measured."""

from pathlib import Path

import pytest
from synthetic_run import write_full_run
from test_ownership import contents
from tiny import write_tiny_checkpoint, write_tiny_tokens
from typer.testing import CliRunner

from slimqwen.artifacts import is_marked
from slimqwen.cli import app
from slimqwen.core.errors import UserError

# With what each of them reads, by its place in `world`. `OUT` is where it is told to write.
COMMANDS = {
    "tokens": "tokens data/text --tokenizer teacher --out OUT",
    "calibrate": "calibrate teacher --tokens data/tokens --out OUT",
    "streaming": "calibrate teacher --tokens data/tokens --streaming --out OUT",
    "plan": "plan teacher --statistics statistics --out OUT",
    "html": "plan page teacher/config.json --out OUT",
    "fit": "plan fit teacher/config.json total=90000 --align 4 --out OUT",
    "search": "plan search teacher total=1M --tokens data/tokens --work search --out OUT",
    "prune": "prune teacher --plan plan.json --out OUT",
    "refit": "refit student --teacher teacher --tokens data/tokens --plan plan.json --out OUT",
    "heal": "heal student --teacher teacher --tokens data/tokens --plan plan.json --out OUT",
    "teacher-cache": "teacher-cache teacher --tokens data/tokens --sequence-length 16 --out OUT",
    "distil": "distil student --teacher teacher --tokens data/tokens --recipe distil.yaml --out OUT",
    "carry": "carry .out.state student --plan plan.json --out OUT",
    "evaluate": "evaluate teacher --tokens data/tokens --out OUT",
    "report": "report run --out OUT",
    "compare": "report run other --out OUT",
}
FOLDERS = {"tokens", "prune", "refit", "heal", "teacher-cache", "distil", "carry"}
DESTROYED = {
    "tokens": ["data/text", "data/text/sub", "data", "teacher"],
    "calibrate": ["teacher/model.safetensors", "teacher/new.safetensors", "data/tokens/train.bin"],
    "streaming": ["teacher/model.safetensors"],
    "plan": ["teacher/config.json", "statistics"],
    "html": ["teacher/config.json"],
    "fit": ["teacher/config.json"],
    "search": ["teacher/config.json", "data/tokens/manifest.json"],
    "prune": ["teacher", "teacher/pruned", "plan.json"],
    "refit": ["teacher", "student", "data/tokens/sub", "."],
    "heal": ["teacher", "student", "data/tokens/sub", "."],
    "teacher-cache": ["teacher", "data/tokens", "data"],
    "distil": ["student", "teacher/distilled", "data/tokens"],
    "carry": [".out.state", "student"],
    "evaluate": ["teacher/config.json", "data/tokens/manifest.json"],
    "report": ["run/evaluation.json", "run/recipe.resolved.yaml"],
    "compare": ["run/evaluation.json", "other/metrics.jsonl"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    tokenizer, _ = write_tiny_tokens(folder / "data")
    write_tiny_checkpoint(folder / "teacher", tokenizer=tokenizer)
    write_tiny_checkpoint(folder / "student", tokenizer=tokenizer)
    for name in ("run", "other"):
        write_full_run(folder / name)
    for name in ("statistics", "plan.json", "mine"):
        (folder / name).write_text("mine")
    (folder / ".out.state").mkdir()
    (folder / "folder").mkdir()
    (folder / "folder" / "mine").write_text("mine")
    (folder / "distil.yaml").write_text("tokens: 1000\n")
    return folder


def refused(world: Path, monkeypatch: pytest.MonkeyPatch, command: str, out: str | Path) -> str:
    """The sentence with which it is refused; nothing may have changed."""
    monkeypatch.chdir(world)
    before = contents(world)
    result = CliRunner().invoke(app, [str(out) if word == "OUT" else word for word in COMMANDS[command].split()])
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    assert result.exception.exit_code == 2
    assert contents(world) == before
    return str(result.exception)


@pytest.mark.parametrize(("command", "out"), [(name, out) for name, outs in DESTROYED.items() for out in outs])
def test_no_output_over_or_in_an_input(world: Path, monkeypatch: pytest.MonkeyPatch, command: str, out: str) -> None:
    assert "which is read here" in refused(world, monkeypatch, command, out)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_output_over_what_slimqwen_did_not_write(world: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    said = refused(world, monkeypatch, command, "folder" if command in FOLDERS else "mine")
    assert "exists and was not written by slimqwen" in said
    refused(world, monkeypatch, command, "mine" if command in FOLDERS else "folder")


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"html", "fit", "search", "report", "compare"}))
@pytest.mark.parametrize("out", ["/sys/x", "mine/x"])
def test_an_output_that_cannot_be_written_is_refused_at_once(
    world: Path, monkeypatch: pytest.MonkeyPatch, command: str, out: str
) -> None:
    assert "cannot be" in refused(world, monkeypatch, command, out)


def test_benchmarks_beside_an_evaluation(world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks.json").write_text("mine")
    monkeypatch.chdir(world)
    options = ["--tokens", "data/tokens", "--tasks", "mmlu", "--out", str(tmp_path / "evaluation.json")]
    result = CliRunner().invoke(app, ["evaluate", "teacher", *options])
    assert isinstance(result.exception, UserError) and "benchmarks.json exists" in str(result.exception)


@pytest.mark.parametrize("command", ["html", "fit", "report", "compare"])
def test_what_a_command_wrote_it_replaces(
    world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.chdir(world)
    for _ in range(2):
        words = [str(tmp_path / "out") if word == "OUT" else word for word in COMMANDS[command].split()]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (result.output, result.exception)
        assert is_marked(tmp_path / "out")
