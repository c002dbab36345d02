"""Nothing of the user's is lost to a run, a search or a log, whatever it is called and wherever it lies."""

import json
import os
from pathlib import Path

import pytest
import torch
from test_pipeline import tiny_recipe
from tiny import QWEN3_NEXT

from slimqwen.artifacts import atomic_folder, fingerprint, write_json
from slimqwen.artifacts.json_lines import append, keep_lines, read_lines, value_of
from slimqwen.artifacts.step_record import StepRecord
from slimqwen.artifacts.warning_file import kept_in
from slimqwen.core.errors import UserError
from slimqwen.core.warning import warn
from slimqwen.recipe import DataRecipe, DistilRecipe, PretrainRecipe, Source
from slimqwen.runs.places import check_apart
from slimqwen.runs.pretrain import pretrain
from slimqwen.runs.recipe_run import run
from slimqwen.runs.record import Steps
from slimqwen.training.metrics import MetricsLog, forget_stages_after
from slimqwen.training.state import saved_states

# --- lines ------------------------------------------------------------------------------------------------------------

FOREIGN = (
    b'{"epoch": 1, "loss": 0.5}\n'
    b'{"stage": 99, "note": "not ours"}\n'
    b"\xff\xfe a line that is no text\r\n"
    b"\n"
    b'{"run": "slimqwen", "stage": "two", "step": 3}\n'
    b"one line \xe2\x80\xa8 and not two\n"
    b'[{"run": "slimqwen"}]\n'
)


def line(run: str, stage: int, step: int) -> bytes:
    return json.dumps({"run": run, "stage": stage, "step": step, "lm": 1.0}).encode() + b"\n"


def test_lines_of_others_in_metrics_stay_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(FOREIGN + line("slimqwen", 1, 4) + b"and the end, without a newline")
    with MetricsLog(path, "slimqwen", 1) as log:
        log.rewind(3)
        log.append(3, {"lm": 1.0})
    assert path.read_bytes() == FOREIGN + b"and the end, without a newline\n" + line("slimqwen", 1, 3)
    forget_stages_after(path, 0, {"slimqwen"})
    assert path.read_bytes() == FOREIGN + b"and the end, without a newline\n"


def test_a_file_without_lines_to_forget_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(FOREIGN + line("slimqwen", 1, 2) + line("of somebody", 9, 9))
    before = path.stat()
    with MetricsLog(path, "slimqwen", 1) as log:
        log.rewind(3)
    forget_stages_after(path, 1, {"slimqwen"})
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("length", range(1, len(line("slimqwen", 1, 3))))
def test_our_own_line_that_a_kill_cut_short_goes(tmp_path: Path, length: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(FOREIGN + line("slimqwen", 1, 2) + line("slimqwen", 1, 3)[:length])
    with MetricsLog(path, "slimqwen", 1) as log:
        log.rewind(3)
        log.append(3, {"lm": 1.0})
    assert path.read_bytes() == FOREIGN + line("slimqwen", 1, 2) + line("slimqwen", 1, 3)


def test_lines_of_others_in_warnings_stay_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "warnings.jsonl"
    with kept_in(path, step="plan", key="a"):
        warn("outdated")
    path.write_bytes(FOREIGN + path.read_bytes() + b'{"step": "plan", "mine": true}\n{"step": "plan", "key": "a", "te')
    for _ in range(2):
        with kept_in(path, step="plan", key="b"):
            warn("current é")
    ours = json.dumps({"step": "plan", "key": "b", "text": "current é"}, ensure_ascii=False).encode() + b"\n"
    assert path.read_bytes() == FOREIGN + b'{"step": "plan", "mine": true}\n' + ours


def test_a_pipe_in_the_place_of_lines_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="Not a regular file"):
        keep_lines(tmp_path / "metrics.jsonl", lambda line: True)


def test_a_line_is_appended_to_whatever_is_there(tmp_path: Path) -> None:
    path = tmp_path / "stages.jsonl"
    for before in (b"", b"x", b"x\n", b"\n"):
        path.write_bytes(before)
        append(path, {"step": "a"})
        assert [value_of(found) for found in read_lines(path)][-1] == {"step": "a"}
        assert path.read_bytes().startswith(before)
    path.unlink()
    append(path, {"step": "\ud800"})  # from a name that is not UTF-8
    assert len(read_lines(path)) == 1


# --- records of steps -------------------------------------------------------------------------------------------------


def make(steps: Steps, name: str, output: Path, content: str = "made") -> int:
    """How often the step was done."""
    done = []

    def action() -> None:
        done.append(output)
        if output.suffix:
            write_json(output, {"format": "slimqwen.test/1", "content": content})
        else:
            with atomic_folder(output) as folder:
                (folder / "part").write_text(content)

    steps.step(name, output, {"from": content}, action)
    return len(done)


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"", b"{", b"[]", b'{"key": 1}', b"[" * 100_000])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, damage: bytes) -> None:
    steps = Steps(tmp_path, "test")
    assert make(steps, "stage-1/plan", tmp_path / "plan.json") == 1
    assert make(steps, "stage-1/plan", tmp_path / "plan.json") == 0
    (tmp_path / ".steps" / "stage-1.plan.json").write_bytes(damage)
    assert steps.records() == []
    assert make(steps, "stage-1/plan", tmp_path / "plan.json") == 1
    assert make(steps, "stage-1/plan", tmp_path / "plan.json") == 0


@pytest.mark.parametrize("made", ["../thesis", "/etc/passwd", "a/../../thesis"])
def test_a_record_names_nothing_outside(tmp_path: Path, made: str) -> None:
    record = StepRecord(name="a", key="a", made=made, output="a", arithmetic={})
    (tmp_path / "a.json").write_text(record.model_dump_json())
    assert StepRecord.read(tmp_path / "a.json") is None


def test_notes_in_an_output_do_not_make_it_another_one(tmp_path: Path) -> None:
    steps = Steps(tmp_path, "test")
    make(steps, "out", tmp_path / "out")
    before = fingerprint(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert make(steps, "out", tmp_path / "out") == 0 and fingerprint(tmp_path / "out") == before
    (tmp_path / "out" / "part").write_text("damaged")
    assert fingerprint(tmp_path / "out") != before
    (tmp_path / "out" / "part").unlink()
    assert fingerprint(tmp_path / "out") != before


def test_another_number_of_threads_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*names: str) -> str:
        steps = Steps(tmp_path, "test")
        for name in names:
            make(steps, name, tmp_path / name)
        return capsys.readouterr().err

    assert "note:" not in said("one", "two") + said("one", "two")
    assert [record.arithmetic["threads"] for record in Steps(tmp_path, "test").records()] == [1, 1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert "note:" not in said("one", "two"), "nothing goes on"
    told = said("one", "two", "three", "one", "four")
    assert told.count("note:") == 1 and f"the run in {tmp_path} was begun with 1 thread, " in told
    assert "goes on with 2 threads" in told
    kept = [value_of(found) for found in read_lines(tmp_path / "warnings.jsonl")]
    assert len(kept) == 1 and kept[0] is not None and kept[0]["step"] == "arithmetic"


# --- a run directory --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and text."""
    folder = tmp_path_factory.mktemp("world")
    tiny_recipe(folder, folder / "run")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FILES = (
    "recipe.resolved.yaml",
    "provenance.json",
    "stages.jsonl",
    "evaluation.json",
    "report.html",
    "stage-1/statistics.safetensors",
    "stage-2/plan.json",
    "lm_only/stage-2/plan.json",
)
FOLDERS = ("tokens", "final", "stage-1/pruned", "stage-2/distilled", "random_init/initial", "one_shot/refitted")


@pytest.mark.parametrize("name", [*FILES, *(f"{folder}/thesis.txt" for folder in FOLDERS)])
def test_what_is_in_the_way_is_found_before_any_work(world: Path, tmp_path: Path, name: str) -> None:
    recipe = tiny_recipe(world, tmp_path / "run")
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("irreplaceable\n")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="was not written by slimqwen"):
        run(recipe)
    assert contents(tmp_path) == before


def test_a_result_that_was_edited_is_not_overwritten(tmp_path: Path) -> None:
    steps, plan = Steps(tmp_path, "test"), tmp_path / "plan.json"
    make(steps, "stage-1/plan", plan)
    steps.check([plan])
    plan.write_text(plan.read_text().replace("made", "my own choice"))
    edited = plan.read_bytes()
    with pytest.raises(UserError, match=r"plan\.json was changed since this run wrote it: move it elsewhere"):
        steps.check([plan])
    assert plan.read_bytes() == edited
    plan.unlink()
    steps.check([plan])
    assert make(steps, "stage-1/plan", plan) == 1


def test_a_run_of_an_earlier_version_is_left_alone_in_one_sentence(world: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(world, tmp_path / "run")
    (tmp_path / "run" / "tokens").mkdir(parents=True)
    (tmp_path / "run" / "tokens" / ".slimqwen").touch()
    (tmp_path / "run" / "recipe.resolved.yaml").write_text("# Every field of the recipe, defaults included.\n")
    (tmp_path / "run" / "provenance.json").write_text(
        '{"command": "slimqwen run", "version": "0", "started": "then"}\n'
    )
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"begun by an earlier version of slimqwen.* choose another run_dir"):
        run(recipe)
    assert contents(tmp_path) == before


def test_a_folder_in_the_place_of_ours_is_found_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(tmp_path, "test")
    make(steps, "final", tmp_path / "final")
    (tmp_path / "final" / "notes.txt").write_text("mine")
    steps.check([tmp_path / "final"])  # what is done is not made again: the notes are in nobody's way
    assert "note: should" in (said := capsys.readouterr().err) and "notes.txt in" in said and "would be lost" in said
    (tmp_path / "final" / ".slimqwen").unlink()
    with pytest.raises(UserError, match="was not written by slimqwen"):
        steps.check([tmp_path / "final"])


APART = {
    "in the data source": {"run_dir": "text/runs/a", "data": "text"},
    "the data source itself": {"run_dir": "text", "data": "text"},
    "around the data source": {"run_dir": ".", "data": "text"},
    "in the held-out source": {"run_dir": "heldout/a", "heldout": "heldout"},
    "around the held-out source": {"run_dir": "heldout", "heldout": "heldout/part"},
    "around token ids": {"run_dir": "ids", "megatron": "ids/train"},
    "in the tokens of calibration": {"run_dir": "other/tokens/run", "calibration": "other/tokens"},
    "around the tokens of calibration": {"run_dir": "other", "calibration": "other/tokens"},
    "around the teacher": {"run_dir": "models"},
    "in the teacher": {"run_dir": "models/teacher/runs/a"},
}


@pytest.mark.parametrize("case", APART)
def test_run_dir_and_what_is_read_are_apart(world: Path, tmp_path: Path, case: str) -> None:
    places = APART[case]
    for name in ("text", "heldout/part", "ids", "other/tokens", "models"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "teacher").symlink_to(tmp_path / "models" / "link")
    (tmp_path / "models" / "link").mkdir()
    for file in (world / "teacher").iterdir():
        (tmp_path / "models" / "link" / file.name).hardlink_to(file)
    for name in ("text/a.txt", "heldout/part/b.txt", "ids/train.bin", "ids/train.idx"):
        (tmp_path / name).write_text("some text")
    sources = [{"path": world / "data" / "text"}]
    if "data" in places:
        sources = [{"path": tmp_path / places["data"]}]
    if "megatron" in places:
        sources = [*sources, {"megatron": tmp_path / places["megatron"]}]
    data = {"sources": sources, "sequence_length": 16, "heldout_sources": [{"path": world / "data" / "heldout_text"}]}
    if "heldout" in places:
        data["heldout_sources"] = [{"path": tmp_path / places["heldout"]}]
    calibration = {"sources": {"a": tmp_path / places["calibration"]}} if "calibration" in places else {}
    overrides = {"teacher": str(tmp_path / "models" / "teacher"), "data": data, "calibration": calibration}
    recipe = tiny_recipe(world, tmp_path / places["run_dir"], **overrides)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"run_dir .* (lies in|holds) the .*, which is read here: choose a"):
        run(recipe)
    assert contents(tmp_path) == before


def test_neighbours_are_apart(tmp_path: Path) -> None:
    check_apart(
        "run_dir", tmp_path / "runs" / "a", {"the data source": [tmp_path / "runs" / "b", tmp_path / "runs/a2"]}
    )


def test_pretraining_reads_changed_text_again_and_keeps_apart(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"left index {number} value " * 20)
    recipe = PretrainRecipe(
        run_dir=tmp_path / "run",
        config=QWEN3_NEXT | {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
        data=DataRecipe(sources=[Source(path=text)], sequence_length=16, heldout_fraction=0.3),
        training=DistilRecipe(tokens=64, batch_size=2, warmup="1 steps", terms=["lm"]),
    )

    def skipped() -> list[str]:
        before = len(read_lines(tmp_path / "run" / "stages.jsonl"))
        pretrain(recipe)
        lines = read_lines(tmp_path / "run" / "stages.jsonl")[before:]
        return [step["step"] for step in map(value_of, lines) if step is not None and step["skipped"]]

    assert skipped() == []
    assert skipped() == ["tokenizer", "tokens", "initial", "trained", "final"]
    file = text / "7.txt"
    stat = file.stat()
    file.write_text(file.read_text().upper())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    assert "tokens" not in skipped()

    with pytest.raises(UserError, match=r"run_dir .* lies in the data source"):
        pretrain(recipe.model_copy(update={"run_dir": text / "run"}))
    written = tmp_path / "other" / "trained" / "thesis.txt"
    written.parent.mkdir(parents=True)
    written.write_text("the user's")
    with pytest.raises(UserError, match="trained exists and was not written by slimqwen"):
        pretrain(recipe.model_copy(update={"run_dir": tmp_path / "other"}))
    assert contents(tmp_path / "other") == {"trained/thesis.txt": b"the user's"}


def test_what_else_lies_beside_saved_states_is_no_state(tmp_path: Path) -> None:
    for name in ("step-000000002", "step-1234567890", "step-notes", "step-000000001.bak", ".step-000000003.partial"):
        (tmp_path / name).mkdir()
    assert [path.name for path in saved_states(tmp_path)] == ["step-000000002", "step-1234567890"]
