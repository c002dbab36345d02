"""The command line as a user meets it: help, suggestions, exit codes, one sentence per mistake."""

import contextlib
import io
import json
import multiprocessing
import re
import resource
import shlex
import shutil
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import typer
import yaml
from ranks import CONTEXT
from tiny import write_tiny_checkpoint, write_tiny_tokens

from slimqwen.cli import app, main
from slimqwen.recipe import EvaluationRecipe
from slimqwen.recipe.file import load_recipe

ROOT = Path(__file__).parent.parent
COMMANDS = tuple(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


FEW_DRAFTS = {"acceptance": {"prompts": 1, "prompt_tokens": 8, "new_tokens": 6, "depth": 2}}
# Of an option that is given twice the last counts.
LESS_WORK = {
    "calibrate": ["--samples", "4", "--sequence-length", "16"],
    "measure-depth": ["--samples", "4", "--sequence-length", "16"],
    "refit": ["--samples", "4", "--sequence-length", "16"],
    "heal": ["--samples", "4", "--sequence-length", "16"],
    "teacher-cache": ["--sequences", "4", "--sequence-length", "16"],
    "distil": ["--set", "tokens=256", "--sequence-length", "16"],
    "evaluate": ["--measured-tokens", "64", "--sequence-length", "16"],
    "generate": ["--max-new-tokens", "8"],
    "bench": ["--prompt-tokens", "4", "--new-tokens", "4", "--runs", "1"],
}


@dataclass
class Result:
    """What a process would have left: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def slimqwen(*arguments: object, cwd: Path | None = None) -> Result:
    """The console script, in this process: starting one costs seconds of imports."""
    out, err = io.StringIO(), io.StringIO()
    returncode = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["slimqwen", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        patch.chdir(cwd or Path.cwd())
        try:
            main()
        except SystemExit as stop:
            returncode = int(stop.code or 0)
        except Exception:
            traceback.print_exc()
            returncode = 1
    return Result(returncode, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/, data/tokens, recipe.yaml: everything that works, to break one thing at a time."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer, _ = write_tiny_tokens(folder / "data")
    layers = ["linear_attention", "full_attention"] * 2
    write_tiny_checkpoint(folder / "teacher", tokenizer=tokenizer, layer_types=layers)
    recipe = {
        "run_dir": "run",
        "teacher": "teacher",
        "target": {"num_hidden_layers": 2, "num_experts": 4},
        "schedule": "one_shot",
        "data": {
            "sources": [{"path": "data/text"}],
            "heldout_sources": [{"path": "data/heldout_text"}],
            "sequence_length": 16,
        },
        "calibration": {"samples": 2},
        "evaluation": {"tokens": 64, **FEW_DRAFTS},
        "distil": {"tokens": 64, "batch_size": 2, "warmup": "0 steps"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def assert_one_sentence(result: Result, code: int, *words: str) -> None:
    """A clear error: the exit code, the words that matter, no traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    message = re.sub(r"[\s│]+", " ", result.stderr)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = slimqwen(*command.split(), "--help")
    assert result.returncode == 0
    assert f"slimqwen {command}" in result.stdout
    assert len(result.stdout.split()) > 25


def test_commands_are_listed_in_the_order_of_the_work() -> None:
    work = ["tokens", "calibrate", "plan", "prune", "refit", "heal", "distil", "evaluate", "report"]
    listed = re.findall(r"^│ ([a-z][a-z-]*(?: [a-z]+)?)  ", slimqwen("--help").stdout, flags=re.M)
    assert [name for name in listed if name in work] == work
    assert listed == list(COMMANDS)
    assert listed.index("plan") + 1 == listed.index("plan fit")


def test_a_command_of_two_words_is_one_command_and_plan_alone_another(world: Path, tmp_path: Path) -> None:
    assert "BUDGETS" in slimqwen("plan", "fit", "--help").stdout
    assert "BUDGETS" not in slimqwen("plan", "--help").stdout.split("Arguments")[1].split("Options")[0]
    assert_one_sentence(
        slimqwen("plan", "fit", world / "teacher"), 2, "slimqwen plan fit", "Missing argument 'BUDGETS'"
    )
    assert_one_sentence(slimqwen("plan", "serch", "x", "total=1M"), 2, "Did you mean the command 'plan search'?")
    assert_one_sentence(slimqwen("plan", "nowhere"), 2, "nowhere does not exist")
    (tmp_path / "fit").symlink_to(world / "teacher")  # a checkpoint that is called as a command is
    assert "parameters" in slimqwen("plan", "./fit", cwd=tmp_path).stdout
    (tmp_path / "fits").symlink_to(world / "teacher")
    assert "parameters" in slimqwen("plan", "fits", cwd=tmp_path).stdout


def test_mistyped_command_and_option_are_suggested(world: Path) -> None:
    assert_one_sentence(slimqwen("evalute"), 2, "evaluate")
    assert_one_sentence(slimqwen("prune", "x", "--plann", "y", "--out", "z"), 2, "--plan")


def test_plan_json_counts_without_weights(world: Path, tmp_path: Path) -> None:
    (tmp_path / "target.yaml").write_text("num_experts: 4\n")
    shutil.copy(world / "teacher" / "config.json", tmp_path / "config.json")
    result = slimqwen("plan", "--json", tmp_path / "config.json", "--target", tmp_path / "target.yaml")
    counts = json.loads(result.stdout)
    assert counts["after"]["parts"]["routed_experts"] * 2 == counts["before"]["parts"]["routed_experts"]
    assert counts["before"]["total_parameters"] == sum(counts["before"]["parts"].values())


def test_stages_one_by_one(world: Path, tmp_path: Path) -> None:
    """The single commands over artefacts give what they say, each reading what the one before wrote."""

    def ok(*arguments: object) -> str:
        result = slimqwen(*arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    (tmp_path / "target.yaml").write_text(
        "{num_hidden_layers: 2, hidden_size: 24, num_experts: 4, num_experts_per_tok: 1}"
    )
    (tmp_path / "distil.yaml").write_text("{tokens: 96, batch_size: 2, warmup: 0 steps}")
    teacher = world / "teacher"
    ok(
        "tokens",
        world / "data" / "text",
        "--heldout",
        world / "data" / "heldout_text",
        "--tokenizer",
        teacher,
        "--out",
        "tokens",
    )
    ok("calibrate", teacher, "--tokens", "tokens", "--samples", 2, "--sequence-length", 16)
    measured = ("--target", "target.yaml", "--statistics", "statistics.safetensors")
    short = ("--samples", 2, "--sequence-length", 16)
    ok("measure-depth", teacher, *measured, "--tokens", "tokens", *short)
    ok("plan", teacher, *measured, "--depth", "depth.json")
    ok("prune", teacher, "--plan", "plan.json", "--out", "pruned")
    training = ("--recipe", "distil.yaml", "--sequence-length", 16, "--set", "learning_rate=1e-3")
    ok("distil", "pruned", "--teacher", teacher, "--tokens", "tokens", "--out", "trained", *training)
    out = ok(
        "evaluate",
        "trained",
        "--teacher",
        teacher,
        "--tokens",
        "tokens",
        "--sequence-length",
        16,
        "--measured-tokens",
        64,
    )
    assert "trained" in out and "teacher" in out
    assert json.loads((tmp_path / "evaluation.json").read_text())["models"]["trained"]["kl_to_teacher"] > 0


# Bad input: one sentence, exit code 2 (or 1 where the work had begun), nothing that looks finished


def run_recipe(world: Path, tmp_path: Path, *overrides: str) -> Result:
    sets = [part for override in (f"run_dir={tmp_path / 'run'}", *overrides) for part in ("--set", override)]
    return slimqwen("run", "recipe.yaml", *sets, cwd=world)


def test_missing_recipe(tmp_path: Path) -> None:
    assert_one_sentence(slimqwen("run", tmp_path / "nowhere.yaml"), 2, "nowhere.yaml")


def test_every_problem_of_a_recipe_at_once(world: Path, tmp_path: Path) -> None:
    result = run_recipe(world, tmp_path, "distil.lerning_rate=1", "target.hidden_size=-4", "schedule=depthfirst")
    assert_one_sentence(result, 2, "did you mean 'learning_rate'", "-4", "depth_first")


def test_target_larger_than_the_source(world: Path, tmp_path: Path) -> None:
    assert_one_sentence(run_recipe(world, tmp_path, "target.hidden_size=64"), 2, "hidden_size", "64", "32")


def test_fewer_experts_than_top_k(world: Path, tmp_path: Path) -> None:
    assert_one_sentence(run_recipe(world, tmp_path, "target.num_experts=1"), 2, "num_experts_per_tok")


def test_missing_teacher(world: Path, tmp_path: Path) -> None:
    assert_one_sentence(run_recipe(world, tmp_path, "teacher=nowhere"), 2, "nowhere")


def test_missing_and_empty_text(world: Path, tmp_path: Path) -> None:
    assert_one_sentence(run_recipe(world, tmp_path, "data.sources=[{path: nowhere}]"), 2, "nowhere")
    (tmp_path / "empty").mkdir()
    assert_one_sentence(run_recipe(world, tmp_path, f"data.sources=[{{path: {tmp_path / 'empty'}}}]"), 2, "empty")


@pytest.mark.parametrize("damage", ["truncated", "header", "garbage"])
def test_corrupt_safetensors(world: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    good = weights.read_bytes()
    broken = {"truncated": good[:-1000], "header": b"\xff" * 16 + good[16:], "garbage": b"not a safetensors file"}
    weights.write_bytes(broken[damage])
    result = run_recipe(world, tmp_path, f"teacher={tmp_path / 'teacher'}")
    assert_one_sentence(result, 2, "model.safetensors", "corrupt or truncated")
    assert not (tmp_path / "run").exists()


def test_tokenizer_of_another_vocabulary(world: Path, tmp_path: Path) -> None:
    _, tokens = write_tiny_tokens(tmp_path / "other", vocab_size=290)
    result = slimqwen("calibrate", world / "teacher", "--tokens", tokens, "--out", tmp_path / "s.safetensors")
    assert_one_sentence(result, 2, "another tokenizer")
    assert not (tmp_path / "s.safetensors").exists()


def test_statistics_of_another_checkpoint(world: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "other", seed=1, tokenizer=world / "teacher")
    tokens = world / "data" / "tokens"
    arguments = ("--tokens", tokens, "--samples", 1, "--sequence-length", 16, "--out", tmp_path / "s.safetensors")
    assert slimqwen("calibrate", world / "teacher", *arguments).returncode == 0
    result = slimqwen(
        "plan", tmp_path / "other", "--statistics", tmp_path / "s.safetensors", "--out", tmp_path / "plan.json"
    )
    assert_one_sentence(result, 2, "were not measured on")
    assert not (tmp_path / "plan.json").exists()


def test_sources_are_weighted_when_planning(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data" / "tokens", tmp_path / "wiki")
    code = f"code={world / 'data' / 'tokens'}"
    options = ("--samples", 4, "--sequence-length", 16)
    result = slimqwen("calibrate", world / "teacher", "--tokens", "wiki", "--tokens", code, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (tmp_path / "target.yaml").write_text("num_experts: 4\n")
    planned = ("plan", world / "teacher", "--target", "target.yaml", "--statistics", "statistics.safetensors")
    weighted = (*planned, "--source-weight", "wiki=0.7", "--source-weight")
    result = slimqwen(*weighted, "code=0.3", "--stability", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "even rows against odd rows: layer Jaccard 1.00; hidden Jaccard 1.00; expert mean" in result.stdout
    assert "wiki against code: " in result.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["sources"] == {"wiki": 32, "code": 32} and len(plan["stability"]) == 2
    assert plan["pruning"]["source_weights"] == {"wiki": 0.7, "code": 0.3}

    assert_one_sentence(slimqwen(*weighted, "cod=0.3", cwd=tmp_path), 2, "'cod' (did you mean 'code'?)")
    assert_one_sentence(slimqwen(*weighted, "code=much", cwd=tmp_path), 2, "NAME=WEIGHT")
    assert_one_sentence(slimqwen(*planned, "--source-weight", "wiki=1", cwd=tmp_path), 2, "leaves out code")
    result = slimqwen("calibrate", world / "teacher", "--tokens", "wiki", "--tokens", "./wiki", *options, cwd=tmp_path)
    assert_one_sentence(result, 2, "two sources are called 'wiki'")
    assert_one_sentence(slimqwen("plan", world / "teacher", "--stability"), 2, "give --statistics")


def test_calibration_sources_of_a_recipe_are_checked_first(world: Path, tmp_path: Path) -> None:
    tokens = json.dumps(str(world / "data" / "tokens"))
    assert_one_sentence(run_recipe(world, tmp_path, "calibration.sources={wiki: nowhere}"), 2, "nowhere")
    sources = f"calibration.sources={{wiki: {tokens}, code: {tokens}}}"
    assert_one_sentence(run_recipe(world, tmp_path, sources, "pruning.source_weights={wiki: 1}"), 2, "leaves out code")
    result = run_recipe(world, tmp_path, "calibration.sources.a/b=data/tokens")
    assert_one_sentence(result, 2, "'a/b' cannot be the name")
    assert not (tmp_path / "run").exists()
    result = run_recipe(world, tmp_path, sources, "pruning.source_weights={wiki: 1, code: 3}")
    assert result.returncode == 0, result.stderr
    plan = json.loads((tmp_path / "run" / "stage-1" / "plan.json").read_text())
    assert plan["sources"] == {"wiki": 16, "code": 16} and plan["pruning"]["source_weights"] == {"wiki": 1, "code": 3}


def test_full_disk(world: Path, tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: the write fails in the middle of a stage, with the library's own error."""

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        result = run_recipe(world, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_sentence(result, 1, "disk")
    assert not (tmp_path / "run" / "final").exists()
    assert not (tmp_path / "run" / "stage-1" / "pruned").exists()


def test_run_dir_that_is_a_file(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    assert_one_sentence(run_recipe(world, tmp_path), 2, str(tmp_path / "run"))


def test_teacher_without_a_tokenizer(world: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "teacher")
    assert_one_sentence(run_recipe(world, tmp_path, f"teacher={tmp_path / 'teacher'}"), 2, "tokenizer.json")
    assert not (tmp_path / "run").exists()


def test_nothing_of_the_users_is_overwritten(world: Path, tmp_path: Path) -> None:
    """Writing over an input, or over a folder that is not ours, is refused before any work."""
    text = tmp_path / "text"
    shutil.copytree(world / "data" / "text", text)
    before = {file: file.read_bytes() for file in text.iterdir()}
    result = slimqwen("tokens", text, "--tokenizer", world / "teacher", "--out", text)
    assert_one_sentence(result, 2, "would destroy")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    result = slimqwen("tokens", text, "--tokenizer", world / "teacher", "--out", tmp_path / "mine")
    assert_one_sentence(result, 2, "was not written by slimqwen")
    assert_one_sentence(run_recipe(world, tmp_path, f"run_dir={world}"), 2, "holds the teacher")
    assert {file: file.read_bytes() for file in text.iterdir()} == before
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "irreplaceable"


def test_problems_of_the_last_stage_are_found_before_the_first(world: Path, tmp_path: Path) -> None:
    # layers alternate linear, full: keeping one leaves no full attention
    result = run_recipe(world, tmp_path, "target.num_hidden_layers=1", "schedule=depth_first", "pruning.depth=last")
    assert_one_sentence(result, 2, "attention")
    assert_one_sentence(run_recipe(world, tmp_path, "execution.device=cuda:7"), 2, "cuda:7")
    assert not (tmp_path / "run").exists()


def test_an_edited_plan(world: Path, tmp_path: Path) -> None:
    arguments = ("--tokens", world / "data" / "tokens", "--samples", 1, "--sequence-length", 16)
    assert slimqwen("calibrate", world / "teacher", *arguments, cwd=tmp_path).returncode == 0
    assert slimqwen("plan", world / "teacher", "--statistics", "statistics.safetensors", cwd=tmp_path).returncode == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["kept_layers"] = [0, 1, 2, 99]
    plan["kept"]["hiden"] = [0]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    result = slimqwen("prune", world / "teacher", "--plan", "plan.json", "--out", "pruned", cwd=tmp_path)
    assert_one_sentence(result, 2, "kept_layers", "does not fit")
    assert not (tmp_path / "pruned").exists()


def test_ctrl_c_is_a_sentence(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimqwen.runs.stages.calibrate", interrupted)
    assert_one_sentence(run_recipe(world, tmp_path), 130, "interrupted", "the same command continues")
    monkeypatch.setattr("slimqwen.generation.generate.speculate", interrupted)
    stopped = slimqwen("generate", "builtin", "--prompt", "def ")
    assert_one_sentence(stopped, 130, "interrupted", "nothing is left half written")
    assert "saved state" not in stopped.stderr


def test_report_of_no_run(tmp_path: Path) -> None:
    assert_one_sentence(slimqwen("report", tmp_path), 2, str(tmp_path))


# README


def readme_commands() -> list[str]:
    """Commands of README's shell blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_readme_commands_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of README, in order, with a tiny model and text where README has real ones.

    They do less of their work than they say. Only parsed: `make` (CI runs it), the 80B recipe (its checkpoint is 160 GB), whose keys and override are checked.
    """
    monkeypatch.setattr("slimqwen.builtin.TEACHER", world / "teacher")
    monkeypatch.setattr("slimqwen.recipe.EvaluationRecipe", partial(EvaluationRecipe, **FEW_DRAFTS))
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: CONTEXT)  # bench's: forked with all imports done
    shutil.copytree(world / "teacher", tmp_path / "Qwen3-Next-80B-A3B-Base")
    for name in ("wiki-tokens", "code-tokens"):
        (tmp_path / name).symlink_to(tmp_path / "tokens")  # which the first command writes
    (tmp_path / "target.yaml").write_text("{num_experts: 4, num_hidden_layers: 3}")
    (tmp_path / "distil.yaml").write_text("{tokens: 2048, batch_size: 4, warmup: 0 steps}")
    shutil.copy(world / "recipe.yaml", tmp_path / "my-recipe.yaml")
    shutil.copytree(world / "data" / "text", tmp_path / "my-text")
    for i in range(10):  # enough documents for a held-out share of 5 %
        for file in (world / "data" / "text").iterdir():
            shutil.copy(file, tmp_path / "my-text" / f"{i}_{file.name}")
    for name in ("teacher", "data", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name if name == "recipes" else world / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(tmp_path / "run")  # what the commands above it have left

    ran = set()
    for command in readme_commands():
        program, *arguments = shlex.split(command, comments=True)
        if program == "make":
            makefile = (ROOT / "Makefile").read_text()
            assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in arguments), command
        elif arguments[:2] == ["run", "recipes/qwen3-next-80b-a3b-to-23b-a2b.yaml"]:
            recipe = load_recipe(ROOT / arguments[1], [arguments[3]])
            assert recipe.teacher == "/models/Qwen3-Next-80B-A3B-Base"
        else:
            assert program == "slimqwen", command
            result = slimqwen(*arguments, *LESS_WORK.get(arguments[0], []), cwd=tmp_path)
            assert result.returncode == 0, (command, result.stderr)
            two_words = " ".join(arguments[:2])
            ran.add(two_words if two_words in COMMANDS else arguments[0])
    assert ran == set(COMMANDS) - {"demo", "pretrain", "study", "carry", "plan search"}


def test_readme_library_example_runs(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The five lines of Python in README, with its paths put in place."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(import slimqwen.*?)```", text, flags=re.S)
    (tmp_path / "recipe.yaml").write_text((world / "recipe.yaml").read_text())
    for name in ("teacher", "data"):
        (tmp_path / name).symlink_to(world / name)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert (tmp_path / "run" / "final" / "config.json").exists()
