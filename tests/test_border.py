"""The command line's border: what options may hold, and that whatever happens ends as a sentence and an exit code."""

import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import BaseModel
from tiny import write_tiny_checkpoint
from typer.main import get_command

from slimqwen.checkpoint.readable import check_companions
from slimqwen.cli import app, main
from slimqwen.cli.command import EVERY_STAGE, OPTION_OF, in_options, options_of
from slimqwen.core.errors import StageFailed, UserError
from slimqwen.core.regular_files import read_regular
from slimqwen.core.torchrun import local_rank, rank, world_size
from slimqwen.model.device import resolve_device
from slimqwen.recipe import Recipe


@dataclass
class Result:
    code: int
    out: str
    err: str


class Program:
    """The console script in this process: starting one costs seconds of imports."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["slimqwen", *map(str, arguments)])
        self.monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main()
        printed = self.capsys.readouterr()
        return Result(int(stop.value.code or 0), printed.out, printed.err)


@pytest.fixture
def slimqwen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(monkeypatch, capsys)


def failing(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str = "serving.check.check_checkpoint"
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"slimqwen.{where}", fail)


# Faults and failures


def test_links_that_lead_to_one_another_are_no_fault(slimqwen: Program, tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    (tmp_path / "loop").symlink_to("loop")
    for out in (tmp_path / "loop", tmp_path / "loop" / "target.yaml"):
        result = slimqwen("plan", "fit", checkpoint, "1GB", "--out", out)
        assert result.code == 2 and "loop" in result.err and "fault" not in result.err, result.err
        assert result.err.count("error:") == 1


def test_a_fault_of_our_own_is_a_sentence_and_its_traceback_a_file(
    slimqwen: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(monkeypatch, KeyError("no\x1b[31m such"))
    result = slimqwen("check", "builtin")
    (file,) = tmp_path.iterdir()
    assert result.code == 70
    assert result.err.startswith("error: KeyError: ") and "fault of slimqwen" in result.err and str(file) in result.err
    assert "Traceback" not in result.err and "\x1b" not in result.err and len(result.err.splitlines()) == 1
    told = file.read_text()
    assert "Traceback" in told and "KeyError" in told and "slimqwen check builtin" in told and "\x1b" not in told


def test_the_traceback_can_be_asked_for(slimqwen: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SLIMQWEN_TRACEBACK", "1")
    failing(monkeypatch, AssertionError())
    result = slimqwen("check", "builtin")
    assert result.code == 70 and "Traceback" in result.err and "traceback above" in result.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_traceback_is_never_lost(slimqwen: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), "cli.border.tempfile.NamedTemporaryFile")
    failing(monkeypatch, RuntimeError("x"))
    result = slimqwen("check", "builtin")
    assert result.code == 70 and "Traceback" in result.err and "traceback above" in result.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("the input is wrong."), 2, "error: the input is wrong."),
        (StageFailed("the work failed."), 1, "error: the work failed."),
        (PermissionError(errno.EACCES, "Permission denied", "/x\n\x1b[2J"), 2, r"/x\n\x1b[2J: Permission denied"),
        (OSError(errno.EMFILE, "Too many open files", "/x/shard"), 1, "ulimit -n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "Free some space"),
        (OSError(errno.EIO, "Input/output error"), 1, "run the same command again"),
        (MemoryError(), 1, "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "not enough memory (CUDA out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate"), 1, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted: it writes nothing"),
    ],
)
def test_each_failure_has_its_code_and_one_sentence(
    error: BaseException, code: int, words: str, slimqwen: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    result = slimqwen("check", "builtin")
    assert (result.code, len(result.err.splitlines())) == (code, 1), result.err
    assert words in result.err and "\x1b" not in result.err


def test_a_disk_that_is_full_is_no_wrong_input_wherever_it_was_noticed(
    slimqwen: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = UserError("x.json cannot be written.")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    failing(monkeypatch, error)
    assert slimqwen("check", "builtin").code == 1


def test_what_an_error_lists_stands_line_by_line(slimqwen: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    error = UserError("2 problems:", "a: wr\nong", "b: wrong")
    assert str(error) == "2 problems:\n  a: wr\nong\n  b: wrong"
    failing(monkeypatch, error)
    assert slimqwen("check", "builtin").err == "error: 2 problems:\n  a: wr\\nong\n  b: wrong\n"


@pytest.mark.parametrize(
    ("command", "where", "words"),
    [
        (["tokens", "x", "--tokenizer", "builtin", "--out", "y"], "data.tokenize.tokenize", "starts again"),
        (["generate", "builtin", "--prompt", "x"], "generation.generate.generate", "it writes nothing"),
        (["prune", "builtin", "--plan", "p", "--out", "y"], "pruning.prune.prune", "the same command continues"),
        (["report", "x"], "reporting.report.report", "nothing is left half written"),
    ],
)
def test_an_interruption_says_what_is_true_of_its_command(
    command: list[str],
    where: str,
    words: str,
    slimqwen: Program,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    failing(monkeypatch, KeyboardInterrupt(), where)
    result = slimqwen(*command)
    assert result.code == 130 and words in result.err and "saved state" not in result.err


# What a command line may hold


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "builtin", "--prompt", "x", "--seed", 2**70], "--seed"),
        (["generate", "builtin", "--prompt", "x", "--max-new-tokens", 2**63], "--max-new-tokens"),
        (["generate", "builtin", "--prompt", "x", "--temperature", "1e300"], "--temperature"),
        (["calibrate", "builtin", "--tokens", "t", "--samples", 2**63], "--samples"),
        (["plan", "builtin", "--gpus", 10**30], "--gpus"),
        (["plan", "builtin", "--statistics", "s", "--source-weight", "a=5e-324"], "--source-weight a=5e-324: a weight"),
        (["plan", "builtin", "--statistics", "s", "--source-weight", "a=nan"], "--source-weight a=nan: a weight is"),
        (["tokens", "x", "--tokenizer", "builtin", "--out", "y", "--weight", "x=1e300"], "--weight x=1e300: a weight"),
        (["tokens", "x", "--tokenizer", "builtin", "--out", "y", "--weight", "x=-1"], "--weight x=-1: a weight is"),
        (["calibrate", "builtin", "--tokens", "t", "--memory-budget", "9000TB"], "'9000TB' is not a size in bytes"),
        (["generate", "builtin", "--prompt", "x", "--temperature", "1e-300"], "temperature 1e-300 must be 0"),
        (["bench", "builtin", "--runs", 10**30], "--runs"),
        (["generate", "builtin", "--prompt", "x", "--device", "meta"], "device 'meta' cannot be used here"),
        (["generate", "builtin", "--prompt", "x", "--device", "a\x1b[31m"], r"device 'a\x1b[31m' cannot"),
        (["check", "b\udce9"], "is not UTF-8"),
        (["check", "builtni"], "did you mean 'builtin'?"),
        (["check", "x\x1b[31m"], r"x\x1b[31m is not a checkpoint folder"),
    ],
)
def test_what_options_cannot_hold_is_one_sentence(arguments: list[object], words: str, slimqwen: Program) -> None:
    result = slimqwen(*arguments)
    assert result.code == 2, result.err
    assert words in result.err and "\x1b" not in result.err and len(result.err.splitlines()) == 1


def test_usage_errors_hold_no_control_characters(slimqwen: Program) -> None:
    wrong = (["generate", "builtin", "--prompt", "x", "--temperature", "nan"], ["check", "builtin", "\x1b[31mtwo"])
    for arguments in (*wrong, ["check", "--\x1b[31mx", "y"], ["\x1b[31mcheck"]):
        result = slimqwen(*arguments)
        assert result.code == 2 and "\x1b[31m" not in result.err


def test_a_tilde_is_the_home_folder_where_the_shell_leaves_it(
    slimqwen: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    monkeypatch.setenv("HOME", str(home))
    here.mkdir()
    monkeypatch.chdir(here)
    write_tiny_checkpoint(home / "model")
    assert slimqwen("check", "~/model").code == 0
    assert slimqwen("plan", "page", "~/model", "--out=~/page.html").code == 0
    assert (home / "page.html").is_file() and not list(here.iterdir())
    (here / "~").mkdir()
    assert slimqwen("plan", "page", "~/model", "--out=./~/page.html").code == 0
    assert (here / "~" / "page.html").is_file()
    assert str(home / "no") in slimqwen("calibrate", "~/model", "--tokens", "wiki=~/no", "--out", "s").err
    assert str(home / "no") in slimqwen("tokens", "wiki=~/no", "--tokenizer", "~/model", "--out=~/t").err


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "-1", "1.5", "9" * 30, "²"])
def test_what_torchrun_sets_is_a_number(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"the variable {name} is "):
        (rank(), world_size(), local_rank())


def test_ranks_of_torchrun(slimqwen: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "")
    assert (rank(), world_size(), local_rank()) == (0, 1, None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (rank(), world_size(), local_rank()) == (1, 2, 3)
    result = slimqwen("study", "depth")
    assert result.code == 2 and result.err.startswith("rank 1: error: 'study' is work for one process")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="ranks count from 0"):
        rank()
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert "the variable WORLD_SIZE is 'x'" in slimqwen("check", "builtin").err


@pytest.mark.parametrize("name", ["meta", "cuda:99", "nope", "", "a\0b", "cpu:x"])
def test_a_device_that_computes_nothing_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot be used here"):
        resolve_device(name)
    assert resolve_device("cpu") == torch.device("cpu")


# Words


OPTIONS = {
    "sequence_length": "--sequence-length",
    "heldout_fraction": "--heldout-fraction",
    "heldout": "--heldout",
    "measured_tokens": "--measured-tokens",
    "samples": "--samples",
    "tokens": "--tokens",
    "device": "--device",
    "seed": "--seed",
}


@pytest.mark.parametrize(
    ("command", "sentence", "told"),
    [
        (
            "tokens",
            "raise data.heldout_fraction or give data.heldout_sources.",
            "raise --heldout-fraction or give --heldout.",
        ),
        ("tokens", "name held-out text in heldout_sources", "name held-out text in --heldout"),
        ("evaluate", "lower evaluation.tokens", "lower --measured-tokens"),
        ("calibrate", "try execution.device: auto.", "try --device auto."),
        ("calibrate", "data.sequence_length: 5 and calibration.samples", "--sequence-length 5 and --samples"),
        ("distil", "set distil.terms to [lm, mtp_lm].", "set terms to [lm, mtp_lm]."),
        ("plan", "pruning.depth 'last' drops", "depth 'last' drops"),
        ("evaluate", "distil.terms has no option here", "distil.terms has no option here"),
        ("calibrate", "the tokens, samples and seed: words", "the tokens, samples and --seed words"),
        (
            "calibrate",
            "/a/data.samples/sequence_length.txt, a/heldout_fraction",
            "/a/data.samples/sequence_length.txt, a/heldout_fraction",
        ),
    ],
)
def test_errors_speak_of_the_options_that_were_given(command: str, sentence: str, told: str) -> None:
    assert in_options(sentence, command, OPTIONS) == told


# The options of the stage commands that are no field of a recipe: files, and what only the command line has.
NO_FIELD = {
    "tokens": {"tokenizer", "out"},
    "calibrate": {"out", "second_moments"},
    "measure-depth": {"target", "statistics", "out", "shortlist"},
    "plan": {"target", "out", "as_json", "context_length", "gpus", "micro_batch_size", "html"}
    | {"statistics", "pruning", "paper", "depth", "stability"}
    | {"gpu_memory", "host_memory", "gpu", "gpus_per_node", "overrides"},
    "plan search": {"tokens", "out", "pick", "align", "shapes", "pruning", "paper", "statistics", "work", "as_json"},
    "prune": {"plan", "out", "shard_size", "layout"},
    "refit": {"teacher", "plan", "out"},
    "heal": {"teacher", "plan", "out"},
    "teacher-cache": {"tokens", "out", "mtp", "sequences"},
    "distil": {
        "tokens",
        "out",
        "settings",
        "teacher",
        "teacher_cache",
        "steps",
        "moments",
        "keep_state",
        "overrides",
        "learning_rate",
    },
    "carry": {"plan", "out"},
    "evaluate": {"tokens", "teacher", "out", "tasks", "suite", "tasks_dir", "limit", "shots"},
}


def fields_of(model: type[BaseModel]) -> set[str]:
    """Every field of a recipe, `data.sources.format` those of lists too."""
    found: set[str] = set()
    for name, info in model.model_fields.items():
        found.add(name)
        kinds = [info.annotation, *get_args(info.annotation)]
        for kind in (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)):
            found |= {f"{name}.{inner}" for inner in fields_of(kind)}
    return found


@pytest.mark.parametrize("name", NO_FIELD)
def test_every_option_that_is_a_field_of_a_recipe_is_named_in_errors(name: str) -> None:
    """A new option of a stage must be in one of the two tables."""
    command = get_command(app).commands[name]
    options = options_of(command)
    fields = {key: option for key, option in (EVERY_STAGE | OPTION_OF.get(name, {})).items() if option in options}
    assert NO_FIELD[name] | set(fields.values()) == set(options)
    assert not NO_FIELD[name] & set(fields.values())
    assert OPTION_OF.get(name, {}).keys() <= fields.keys() <= fields_of(Recipe)
    for key, option in fields.items():
        given = options[option]
        last = key.rpartition(".")[2]
        assert in_options(f"{key}: 5 is too much.", name, options) == f"{given} 5 is too much."
        if key != last:
            assert in_options(f"lower {key}, or {key} 'x'.", name, options) == f"lower {given}, or {given} 'x'."
        if "_" in last:
            assert in_options(f"lower {last}.", name, options) == f"lower {given}."


def test_other_stages_fields_stay_as_they_are() -> None:
    options = options_of(get_command(app).commands["evaluate"])  # --batch-size and --tokens are other things here
    sentence = "lower distil.batch_size, distil.tokens or calibration.sources: x."
    assert in_options(sentence, "evaluate", options) == sentence
    options = options_of(get_command(app).commands["plan"])
    said = in_options("set pruning.experts.keep_outliers: true and pruning.depth: measured.", "plan", options)
    assert said == "set experts.keep_outliers: true and depth: measured."


def test_what_is_wrong_with_an_option_begins_with_it_or_names_it(
    slimqwen: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for number in range(9):
        (Path("text") / f"{number}.txt").write_text(" ".join(map(str, range(400))))
    Path("notes.log").write_text("x")
    made = slimqwen("tokens", "text", "--tokenizer", "builtin", "--out", "tokens", "--workers", "1")
    assert made.code == 0, made.err
    tokenize = ("tokens", "text", "--tokenizer", "builtin", "--out", "other", "--workers", "1")
    calibrate = ("calibrate", "builtin", "--tokens", "tokens")
    cache = ("teacher-cache", "builtin", "--tokens", "tokens", "--out", "cache")
    refit = ("refit", "builtin", "--teacher", "builtin", "--tokens", "tokens", "--plan", "p", "--out", "o")
    for arguments, words in {
        (*calibrate, "--tokens", "more=tokens", "--samples", "1"): "raise --samples",
        (*calibrate, "--samples", "99999999999"): "lower --samples",
        (*calibrate, "--sequence-length", "100000"): "lower --sequence-length",
        (*calibrate, "--memory-budget", "0GB"): "--memory-budget: '0GB' is not a size",
        (*calibrate, "--device", "gpu"): "try --device auto",
        (*refit, "--memory-budget", "much"): "--memory-budget: 'much' is not a size",
        (*cache, "--shard-size", "0"): "--shard-size: '0' is not a size",
        (*cache, "--memory-budget", "-1GB"): "--memory-budget: '-1GB' is not a size",
        (*cache, "--top-k", "9999999"): "--top-k 9,999,999 is more than",
        ("prune", "builtin", "--plan", "p", "--out", "o", "--shard-size", "5XB"): "--shard-size: '5XB' is not a size",
        (*tokenize, "--separator", "nope"): "--separator 'nope' is not a token",
        (*tokenize, "--weight", "txt=1"): "--weight is given for 'txt' (did you mean 'text'?)",
        (*tokenize, "--weight", "text=0"): "the --weight of 'text' must be positive",
        (*tokenize, "--heldout-fraction", "1.0"): "lower --heldout-fraction",
        (*tokenize, "--heldout", "notes.log"): "as --format",
    }.items():
        result = slimqwen(*arguments)
        assert result.code == 2 and words in result.err, (arguments, result.err)


def test_a_stages_error_names_the_commands_option(slimqwen: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, UserError("too short: lower data.sequence_length."), "generation.generate.generate")
    assert "data.sequence_length" in slimqwen("generate", "builtin", "--prompt", "x").err  # it has no such option
    failing(monkeypatch, UserError("too short: lower data.sequence_length."), "calibration.calibrate.calibrate")
    result = slimqwen("calibrate", "builtin", "--tokens", "t")
    assert result.err == "error: too short: lower --sequence-length.\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "file"], "file is a file, not a checkpoint folder"),
        (["check", "empty"], "empty has no config.json"),
        (["check", "nothing"], "nothing is not a checkpoint folder"),
        (["plan", "file"], "file is not valid JSON"),
        (["plan", "empty"], "empty has no config.json"),
        (["plan", "nothing"], "nothing does not exist"),
        (["plan", "builtin", "--target", "empty"], "empty cannot be read: Is a directory"),
        (["plan", "builtin", "--target", "nothing"], "there is no file nothing"),
        (["plan", "builtin", "--target", "file"], "file must hold key: value pairs"),
        (["plan", "builtin", "--statistics", "empty"], "empty is a folder: give the file"),
        (["plan", "builtin", "--statistics", "nothing"], "nothing is not a readable statistics file"),
        (["plan", "builtin", "--statistics", "file"], "file is not a readable statistics file"),
        (["report", "file"], "file is a file: give the run directory"),
        (["report", "empty"], "empty is not a run directory"),
        (["report", "nothing"], "there is no folder nothing"),
        (["report", "empty", "file"], "empty is not a run directory"),
    ],
)
def test_a_path_of_another_kind_is_one_sentence(
    arguments: list[str], words: str, slimqwen: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("hi")
    Path("empty").mkdir()
    result = slimqwen(*arguments)
    assert (result.code, len(result.err.splitlines())) == (2, 1) and words in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Not the superuser, who may read everything."""
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    Path("f").mkdir(mode=0)
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    yield
    if superuser:
        os.seteuid(0)
    Path("f").chmod(0o755)


def test_what_never_ends_is_not_read(slimqwen: Program, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="Not a regular file"):
            read_regular(path)
        result = slimqwen("prune", "builtin", "--plan", path, "--out", tmp_path / "out")
        assert result.code == 2 and f"{path} cannot be read (Not a regular file)" in result.err
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)


def test_what_is_copied_at_the_end_is_read_at_the_start(nobody: None) -> None:
    folder = Path("f")  # the folders above it are the superuser's
    os.seteuid(os.getuid())
    folder.chmod(0o755)
    for name in ("generation_config.json", "chat_template.jinja", "LICENSE"):
        (folder / name).write_text("{}")
        check_companions(folder)
        (folder / name).chmod(0)
        if os.getuid() == 0:
            os.seteuid(65534)
        with pytest.raises(UserError, match=rf"{name} is copied into .* cannot be read \(Permission denied\)"):
            check_companions(folder)
        os.seteuid(os.getuid())
        (folder / name).unlink()


@pytest.mark.parametrize("arguments", [["check", "f"], ["plan", "f"], ["report", "f"], ["report", "f", "."]])
def test_a_folder_that_may_not_be_read_is_one_sentence(arguments: list[str], slimqwen: Program, nobody: None) -> None:
    result = slimqwen(*arguments)
    assert result.code == 2 and len(result.err.splitlines()) == 1, result.err
    assert "f" in result.err and "Permission denied" in result.err


def test_the_version_is_said(slimqwen: Program) -> None:
    result = slimqwen("--version")
    assert result.code == 0 and result.err == ""
    assert result.out.startswith(f"slimqwen {version('slimqwen')} (torch {version('torch')}, transformers ")
