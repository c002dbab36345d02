import errno
import json
import os
import threading
from functools import partial
from pathlib import Path

import pytest

from slimqwen.artifacts import (
    MARKER,
    alone,
    atomic_file,
    atomic_folder,
    check_replaceable,
    claim_folder,
    fingerprint,
    fingerprint_value,
    identity,
    joined_folder,
    resumable_folder,
    write_json,
)
from slimqwen.core.errors import StageFailed, UserError


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name != MARKER)


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "plan.json"
    with atomic_file(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["plan.json"]


def test_a_failed_file_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "plan.json"
    with atomic_file(path) as partial:
        partial.write_text("# Written by slimqwen: old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "# Written by slimqwen: old"
    assert names(tmp_path) == ["plan.json"]


def test_a_folder_replaces_the_old_one_with_all_its_contents(tmp_path):
    path = tmp_path / "pruned"
    with atomic_folder(path) as partial:
        (partial / "stale.safetensors").write_text("old")
    with atomic_folder(path) as partial:
        (partial / "config.json").write_text("{}")
        assert names(path) == ["stale.safetensors"]
    assert names(path) == ["config.json"]
    assert names(tmp_path) == ["pruned"]


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "pruned"
    with atomic_folder(path) as partial:
        (partial / "config.json").write_text("old")
    with pytest.raises(RuntimeError, match="stopped"), atomic_folder(path) as partial:
        (partial / "config.json").write_text("half")
        raise RuntimeError("stopped")
    assert (path / "config.json").read_text() == "old"
    assert names(tmp_path) == ["pruned"]


def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("irreplaceable")
    monkeypatch.chdir(tmp_path / "home")
    for path in (tmp_path / "home", Path("."), Path("../home")):
        with pytest.raises(UserError, match="not written by slimqwen"), atomic_folder(path):
            raise AssertionError("the work must not begin")
    with pytest.raises(UserError, match="would destroy"):
        check_replaceable(tmp_path / "home", tmp_path / "home" / "thesis.txt")
    assert names(tmp_path / "home") == ["thesis.txt"]


def test_what_a_killed_process_left_behind_is_cleared(tmp_path):
    path = tmp_path / "pruned"
    left_behind = tmp_path / ".pruned.partial"
    claim_folder(left_behind, None)
    (left_behind / "model-00001.safetensors").write_text("half")
    with atomic_folder(path) as partial:
        (partial / "config.json").write_text("{}")
    assert names(path) == ["config.json"]
    assert names(tmp_path) == ["pruned"]


def test_a_resumable_folder_keeps_what_was_finished_of_the_same_work(tmp_path, capsys):
    path = tmp_path / "pruned"
    with pytest.raises(KeyboardInterrupt), resumable_folder(path, "plan 1") as partial:
        (partial / "shard-1").write_text("whole")
        (partial / ".shard-2").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == [".pruned.partial"]
    assert f"stays in {tmp_path / '.pruned.partial'}: the same command continues" in capsys.readouterr().err
    with resumable_folder(path, "plan 1") as partial:
        assert (partial / "shard-1").read_text() == "whole"
        assert names(partial) == ["shard-1"]  # half of another is of no use
        (partial / "shard-2").write_text("whole")
    assert names(tmp_path) == ["pruned"] and names(path) == ["shard-1", "shard-2"]
    assert capsys.readouterr().err == ""


def test_a_resumable_folder_of_other_work_begins_empty(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), resumable_folder(tmp_path / "pruned", "plan 1") as partial:
        (partial / "shard-1").write_text("whole")
        raise KeyboardInterrupt
    capsys.readouterr()
    with resumable_folder(tmp_path / "pruned", "plan 2") as partial:
        assert names(partial) == []
    assert "was left behind by other work" in capsys.readouterr().err


def test_a_resumable_folder_without_anything_finished_goes(tmp_path, capsys):
    with pytest.raises(UserError), resumable_folder(tmp_path / "pruned", "plan 1") as partial:
        (partial / ".shard-1").write_text("half")
        raise UserError("no room")
    assert names(tmp_path) == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'),
    ],
)
@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder, joined_folder, partial(resumable_folder, key="work")])
def test_a_full_disk_is_one_sentence(tmp_path, atomic, error):
    path = tmp_path / "artefact"
    with pytest.raises(StageFailed) as failed, atomic(path):
        raise error
    assert str(failed.value) == (
        f"{path} could not be written: the disk is full, or a quota or file-size limit is reached. "
        "Free some space and run the same command again."
    )
    assert failed.value.exit_code == 1
    assert names(tmp_path) == []


def test_other_os_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), atomic_file(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_json_is_readable_and_complete(tmp_path):
    write_json(tmp_path / "x.json", {"name": "é", "kept": [1, 2]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "é", "kept": [1, 2]}
    assert "é" in text and text.endswith("}\n")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "checkpoint" / "shards").mkdir(parents=True)
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    (tmp_path / "checkpoint" / "shards" / "a.bin").write_bytes(b"0123456789")
    return tmp_path / "checkpoint"


def test_one_at_a_time_holds_a_lock(tmp_path, capsys):
    order = []

    def second():
        with alone(tmp_path / "a", wait=True):
            order.append("second")

    waiting = threading.Thread(target=second)
    with alone(tmp_path / "a", wait=True):
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and order == []
        order.append("first")
    waiting.join()
    assert order == ["first", "second"] and names(tmp_path) == []
    assert "a: another process is making it, waiting" in capsys.readouterr().err


def test_fingerprint_changes_with_content_name_and_files(folder):
    shard = folder / "shards" / "a.bin"
    seen = [fingerprint(folder)]
    shard.write_bytes(b"0123456780")
    seen.append(fingerprint(folder))
    shard.rename(folder / "shards" / "b.bin")
    seen.append(fingerprint(folder))
    (folder / "empty").touch()
    seen.append(fingerprint(folder))
    assert len(set(seen)) == 4


def test_fingerprint_is_that_of_the_contents(folder, tmp_path):
    before = fingerprint(folder)
    (folder / ".done").write_text("bookkeeping")
    os.utime(folder / "config.json", (0, 0))
    assert fingerprint(folder) == before
    assert fingerprint(folder.rename(tmp_path / "elsewhere")) == before


def test_fingerprint_of_one_file(folder):
    before = fingerprint(folder / "config.json")
    (folder / "config.json").write_text("[]")
    assert fingerprint(folder / "config.json") != before


def test_fingerprint_of_a_large_file_notices_size_and_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "FULLY_HASHED_BYTES", 1000)
    monkeypatch.setattr(identity, "SAMPLE_BYTES", 10)
    path = tmp_path / "model.safetensors"
    seen = []
    for contents in (bytes(2000), b"x" + bytes(1999), bytes(1999) + b"x", bytes(2001)):
        path.write_bytes(contents)
        seen.append(fingerprint(path))
    assert len(set(seen)) == 4


def test_fingerprint_of_a_large_file_notices_another_matrix_anywhere(tmp_path, monkeypatch):
    for name, value in (("FULLY_HASHED_BYTES", 1000), ("SAMPLE_BYTES", 10), ("SAMPLE_EVERY_BYTES", 100)):
        monkeypatch.setattr(identity, name, value)
    path = tmp_path / "model.safetensors"
    seen = set()
    for start in range(0, 2900, 50):
        path.write_bytes(bytes(start) + b"x" * 110 + bytes(2890 - start))
        seen.add(fingerprint(path))
    assert len(seen) == 58


def test_fingerprint_of_a_value_ignores_the_order_of_keys():
    assert fingerprint_value({"a": 1, "b": [1, 2]}) == fingerprint_value({"b": [1, 2], "a": 1})
    assert fingerprint_value({"a": 1, "b": [1, 2]}) != fingerprint_value({"a": 1, "b": [2, 1]})


def test_an_artefact_is_on_the_disk_before_it_gets_its_name_and_its_name_after(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def flushed(descriptor):
        done.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path)}")
        fsync(descriptor)

    def renamed(function):
        def rename(source, target):
            done.append(f"rename to {Path(target).relative_to(tmp_path)}")
            function(source, target)

        return rename

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed(rename))
    monkeypatch.setattr(os, "replace", renamed(replace))
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "below").mkdir()
        (partial / "below" / "a").write_text("a")
    place = done.index("rename to out")
    folder = ".out.partial"
    needed = [folder, f"{folder}/below", f"{folder}/below/a", f"{folder}/{MARKER}"]
    assert {f"flush {name}" for name in needed} <= set(done[done.index(f"rename to {folder}/{MARKER}") : place])
    assert done[place + 1] == "flush ."
    done.clear()
    with atomic_file(tmp_path / "x") as partial:
        partial.write_text("x")
    place = done.index("rename to x")
    assert done[place - 1] == "flush .x.partial/x" and done[place + 1] == "flush ."
