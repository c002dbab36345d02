"""What is replaced and removed: what slimqwen wrote, and nothing else. One process at a time."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from test_artifacts import names

from slimqwen.artifacts import (
    MARKER,
    alone,
    alone_in,
    atomic_file,
    atomic_folder,
    check_file_replaceable,
    check_replaceable,
    claim_folder,
    is_marked,
    lock,
    makes_file,
    remove_ours,
    resumable_folder,
    scratch_folder,
    tidy,
    write_json,
    write_text,
)
from slimqwen.artifacts.record import HASHED_BYTES
from slimqwen.core.errors import StageFailed, UserError
from slimqwen.training.inputs import TrainingInputs

OURS = {"format": "slimqwen.test/1"}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder artefact with a small file, a large one and one in a folder below."""
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
        (partial / "model.safetensors").write_bytes(bytes(HASHED_BYTES + 1))
        (partial / "below").mkdir()
        (partial / "below" / "a").write_text("a")
    return tmp_path / "out"


def replace(out: Path) -> None:
    with atomic_folder(out) as partial:
        (partial / "new").touch()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What somebody put beside, into or in place of what we wrote


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "below/notes.txt"])
def test_what_was_put_into_a_folder_of_ours_is_not_lost(written: Path, name: str) -> None:
    (written / name).write_text("mine")
    before = contents(written)
    with pytest.raises(UserError, match=f"{name} in {written} would be lost, and it was not there when slimqwen wrote"):
        replace(written)
    assert not remove_ours(written)
    assert contents(written) == {name: before[name]}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_was_changed_in_a_folder_of_ours_is_not_lost(written: Path, name: str) -> None:
    with (written / name).open("a") as stream:
        stream.write("mine")
    before = contents(written)
    with pytest.raises(UserError, match=f"{name} in {written} was changed since slimqwen wrote"):
        replace(written)
    assert contents(written) == before


def test_a_link_put_into_a_folder_of_ours_is_not_followed(written: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (written / "config.json").unlink()
    (written / "config.json").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"config\.json in"):
        replace(written)
    remove_ours(written)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_that_became_a_link_is_not_followed(written: Path, tmp_path: Path) -> None:
    (written / "below").rename(tmp_path / "elsewhere")
    (written / "below").symlink_to(tmp_path / "elsewhere")
    assert not remove_ours(written)
    assert (tmp_path / "elsewhere" / "a").read_text() == "a" and names(written) == ["below"]


def test_what_is_missing_of_a_folder_of_ours_is_no_loss(written: Path) -> None:
    (written / "config.json").unlink()
    replace(written)
    assert names(written) == ["new"]


def test_a_folder_of_an_earlier_version_does_not_say_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).touch()
    with pytest.raises(UserError, match=r"was written by an earlier version of slimqwen.*remove it, or move it"):
        replace(tmp_path / "out")


@pytest.mark.parametrize(
    "record",
    [
        "[]",
        "{}",
        '{"format": "slimqwen.folder/1"}',
        '{"format": "slimqwen.folder/1", "key": null, "files": ["a"]}',
        "\0",
        "[" * 5000,
    ],
)
def test_a_record_that_is_none_claims_nothing(tmp_path: Path, record: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text(record)
    with pytest.raises(UserError, match="not written by slimqwen"):
        replace(tmp_path / "out")
    assert not remove_ours(tmp_path / "out")
    assert (tmp_path / "out" / MARKER).read_text() == record


@pytest.mark.parametrize("kind", ["partial", "replaced", "removed"])
@pytest.mark.parametrize("make", [replace, lambda out: write_json(out, OURS)])
def test_somebody_elses_thing_under_a_hidden_name_stays(tmp_path: Path, kind: str, make) -> None:  # type: ignore[no-untyped-def]
    victim, hidden = tmp_path / "victim", tmp_path / f".out.{kind}"
    victim.mkdir()
    (victim / "mine").write_text("mine")
    for put in (lambda: hidden.symlink_to(victim), lambda: hidden.write_text("mine"), lambda: victim.rename(hidden)):
        put()
        with pytest.raises(UserError, match=rf"\.out\.{kind} is in the way and was not written by slimqwen"):
            make(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert (hidden / "mine").read_text() == "mine" if hidden.is_dir() else hidden.read_text() == "mine"
        if not hidden.is_dir() or hidden.is_symlink():
            hidden.unlink()


def test_a_stale_partial_folder_of_ours_goes(tmp_path: Path) -> None:
    claim_folder(tmp_path / ".out.partial", None)
    (tmp_path / ".out.partial" / "half").touch()
    replace(tmp_path / "out")
    assert names(tmp_path) == ["out"]


# Files


@pytest.mark.parametrize(
    "text", ["mine", '{"model_type": "qwen3_moe"}', "<!DOCTYPE html>\n<p>mine", "# mine: slimqwen\n"]
)
def test_a_file_that_is_not_ours_is_not_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    for write in (lambda: write_text(path, "x"), lambda: write_json(path, OURS)):
        with pytest.raises(UserError, match="exists and was not written by slimqwen: choose another name"):
            write()
    assert not remove_ours(path)
    assert path.read_text() == text and names(tmp_path) == ["config.json"]


def test_a_result_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    plan, statistics = tmp_path / "plan.json", tmp_path / "s.safetensors"
    write_json(plan, {"format": "slimqwen.plan/1"})
    save_file({}, statistics, metadata={"slimqwen": "statistics"})
    check_file_replaceable(plan, kind="plan")
    check_file_replaceable(statistics, kind="safetensors")
    for file, kind in ((plan, "evaluation"), (statistics, "evaluation"), (plan, "safetensors")):
        with pytest.raises(UserError, match=f"{file.name} exists and is not an earlier {kind}: choose another"):
            check_file_replaceable(file, kind=kind)


def test_a_folder_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    files = {
        "checkpoint": {"config.json": {}},
        "tokens": {"manifest.json": {"format": "slimqwen.tokens/1"}},
        "folder": {},
    }
    for kind, content in files.items():
        with atomic_folder(tmp_path / kind) as partial:
            (partial / "x").touch()
            for name, value in content.items():
                write_json(partial / name, value)
    words = {
        "checkpoint": "a checkpoint",
        "tokens": "tokens",
        "teacher_cache": "a teacher cache",
        "folder": "other work",
    }
    for found in files:
        for kind in ("checkpoint", "tokens", "teacher_cache"):
            if found == kind:
                check_replaceable(tmp_path / found, kind=kind)
                continue
            with pytest.raises(
                UserError, match=f"{found} holds {words[found]}.*, and {words[kind]} would take its place"
            ):
                check_replaceable(tmp_path / found, kind=kind)
    check_replaceable(tmp_path / "nothing", kind="tokens")


def test_what_slimqwen_writes_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()  # an empty file is no loss
    for text in ('{\n  "format": "slimqwen.plan/1"\n}', "# Written by slimqwen\nhidden_size: 3\n"):
        write_text(path, text)
        assert is_marked(path)
    assert remove_ours(path) and names(tmp_path) == []


def test_a_file_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "x") as partial:
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_a_link_to_a_file_of_ours_stays_a_link(tmp_path: Path) -> None:
    write_json(tmp_path / "real", OURS)
    (tmp_path / "latest").symlink_to("real")
    write_json(tmp_path / "latest", OURS | {"n": 1})
    assert (tmp_path / "latest").is_symlink() and '"n": 1' in (tmp_path / "real").read_text()


# Places


@pytest.mark.parametrize("check", [check_replaceable, check_file_replaceable])
def test_no_output_in_around_or_in_place_of_an_input(tmp_path: Path, check) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "input" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "input")
    for out in ("input", "input/new", "input/below/new/x", "link/new", "../" + tmp_path.name):
        with pytest.raises(UserError, match="which is read here"):
            check(tmp_path / out, tmp_path / "input")
    check(tmp_path / "inputs", tmp_path / "input")


@pytest.mark.parametrize("out", ["/sys/x", "/proc/1/x/y", "file/x", "n" * 250])
def test_where_nothing_can_be_written_is_known_at_the_start(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()

    @makes_file("checkpoint")
    def stage(checkpoint: Path, out: Path) -> None:
        raise AssertionError("the work must not begin")

    with pytest.raises(UserError, match=r"cannot be|too long") as refused:
        stage(tmp_path / "checkpoint", out=tmp_path / out)
    assert refused.value.exit_code == 2 and names(tmp_path) == ["file"]


@pytest.mark.parametrize("out", ["student", "moments", "moments/new"])
def test_no_stage_writes_over_its_inputs_in_a_dataclass(tmp_path: Path, out: str) -> None:
    @makes_file("inputs")
    def stage(inputs: TrainingInputs, out: Path) -> None:
        raise AssertionError("the work must not begin")

    inputs = TrainingInputs(tmp_path / "student", tmp_path / "tokens", moments=tmp_path / "moments")
    with pytest.raises(UserError, match="which is read here"):
        stage(inputs, out=tmp_path / out)


def test_folders_made_for_nothing_go(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert names(tmp_path) == []


# What killed processes leave


def test_an_old_folder_that_was_not_yet_replaced_comes_back(written: Path) -> None:
    before = contents(written)
    written.rename(written.with_name(".out.replaced"))
    with pytest.raises(RuntimeError), atomic_folder(written):
        raise RuntimeError
    assert contents(written) == before and names(written.parent) == ["out"]


def test_what_is_half_removed_does_not_come_back(written: Path) -> None:
    written.rename(written.with_name(".out.removed"))
    (written.with_name(".out.removed") / "config.json").unlink()
    assert remove_ours(written) and names(written.parent) == []


def test_other_work_in_a_working_folder_of_ours_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim_folder(tmp_path / ".state", "one")
    (tmp_path / ".state" / "step-1").mkdir()
    claim_folder(tmp_path / ".state", "one")
    assert names(tmp_path / ".state") == ["step-1"]
    claim_folder(tmp_path / ".state", "other")
    assert names(tmp_path / ".state") == [] and "left behind by other work" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").touch()
    with pytest.raises(UserError, match="not written by slimqwen"):
        claim_folder(tmp_path / "mine", "one")


def test_what_was_unfinished_in_resumable_work_goes_when_it_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), resumable_folder(tmp_path / "x", "key") as folder:
        (folder / "000").touch()
        raise KeyboardInterrupt
    claim_folder(folder / ".001.partial", None)  # as kills leave it
    (folder / ".002.removed").mkdir()
    (folder / ".shard.partial").touch()
    with resumable_folder(tmp_path / "x", "key") as folder:
        assert names(folder) == ["000"]


def test_scratch_goes_with_success_and_stays_with_an_interruption(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch_folder(tmp_path / "x", "key") as folder:
        (folder / "000").touch()
        raise KeyboardInterrupt
    with scratch_folder(tmp_path / "x", "key") as folder:
        assert names(folder) == ["000"]
    assert names(tmp_path) == []


def test_tidy_leaves_the_finished_artefact_alone(written: Path) -> None:
    claim_folder(written.with_name(".out.partial"), None)
    written.with_name(".out.lock").write_text(lock.SIGNATURE + "process 1")
    before = contents(written)
    tidy(written)
    assert contents(written) == before and names(written.parent) == ["out"]


# One process at a time

HOLD = """
import sys
from pathlib import Path
from slimqwen.artifacts import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_makes_it_and_a_dead_one_lets_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for make in (replace, lambda out: resumable_folder(out, "key").__enter__()):
            with pytest.raises(
                UserError, match=rf"is being made by another process \(process {holder.pid} on .* since"
            ):
                make(out)
        assert names(tmp_path) == [".out.lock"]
        holder.kill()
    replace(out)
    assert names(tmp_path) == ["out"]


def test_a_run_directory_is_held_from_within(tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"), alone_in(tmp_path / "run"):  # again, by who has it
        assert names(tmp_path / "run") == [".lock"]
        with alone(tmp_path / "run" / "out"):
            assert names(tmp_path / "run") == [".lock", ".out.lock"]
    assert names(tmp_path) == []


def test_a_file_called_like_a_lock_stays(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("mine")
    replace(tmp_path / "out")
    assert (tmp_path / ".out.lock").read_text() == "mine"
    (tmp_path / ".out.lock").unlink()
    (tmp_path / ".out.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be written"):
        replace(tmp_path / "out")
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_system_without_locks_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    replace(tmp_path / "out")
    assert names(tmp_path) == ["out"] and "this file system has no locks" in capsys.readouterr().err


def test_a_disk_full_when_the_work_goes_on_is_no_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for function in ("open", "mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, refuse)
            with pytest.raises(StageFailed, match="the disk is full"):
                replace(tmp_path / "new" / "out")


def test_only_the_first_rank_holds_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with alone(tmp_path / "out"):
        assert names(tmp_path) == []
