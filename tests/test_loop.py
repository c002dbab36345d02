"""Around the steps: states written meanwhile, bad steps, what is measured on the way, and who is told."""

import errno
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from rounding import FORWARD, TRAINED
from safetensors.torch import load_file
from settings import sections
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import write_tiny_checkpoint, write_tiny_tokens
from torch.distributed.checkpoint.staging import DefaultStager

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import Preempted, StageFailed, UserError
from slimqwen.evaluation.fidelity import compare, heldout_rows, record
from slimqwen.model.model import load
from slimqwen.model.peaks import peak_of
from slimqwen.recipe import DistilRecipe, TextSettings
from slimqwen.shapes.footprint import forward_flops
from slimqwen.training import heldout, loggers, speed, state
from slimqwen.training.distil import distil
from slimqwen.training.guard import FEWEST, WINDOW, Guard, GuardRecord, Rollback
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.loggers import check_loggers, open_loggers
from slimqwen.training.metrics import MetricsLog
from slimqwen.training.trainer import MAX_ROLLBACKS, Trainer

SEQUENCE_LENGTH = 16
BATCH_SIZE = 4
STEP_TOKENS = BATCH_SIZE * SEQUENCE_LENGTH
STEPS = 6
TWO_LAYERS = {"num_hidden_layers": 2, "full_attention_interval": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student`, a `teacher` and `tokens`; read-only."""
    folder = tmp_path_factory.mktemp("loop")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "student", tokenizer=tokenizer, **TWO_LAYERS)
    write_tiny_checkpoint(folder / "teacher", seed=1, tokenizer=tokenizer, hidden_size=40, num_experts=3, **TWO_LAYERS)
    return folder


def train(folder: Path, out: Path, **changes: Any) -> Path:
    """`distil` on the files of `folder`."""
    settings = {
        "tokens": changes.pop("steps", STEPS) * STEP_TOKENS,
        "batch_size": BATCH_SIZE,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "warmup": "2 steps",
        "save_every": "2 steps",
        "loss_chunk_tokens": 24,
    }
    return distil(
        TrainingInputs(folder / "student", folder / "tokens", teacher=folder / "teacher"),
        out,
        **sections(DistilRecipe, settings | changes),
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
    )


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes of it without anything special."""
    return train(folder, tmp_path_factory.mktemp("expected") / "out")


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out.parent / "metrics.jsonl").read_text().splitlines()]
    for name in ("seconds", "tokens_per_second", "memory_bytes"):
        assert all(line.pop(name) > 0 for line in lines)
    return lines


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def states(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out.parent / f".{out.name}.state").glob("step-*"))


def before_step(patch: pytest.MonkeyPatch, number: int, action: Callable[[Trainer], object]) -> None:
    """Call `action` once, when the trainer begins step `number`."""
    original, done = Trainer.step, []

    def step(self: Trainer, step: int) -> dict[str, float]:
        if step == number and not done:
            done.append(number)
            action(self)
        return original(self, step)

    patch.setattr(Trainer, "step", step)


class Killed(Exception):
    """Stands for kill -9."""


def kill(_: Trainer) -> None:
    raise Killed


def test_a_training_of_another_revision_is_not_continued(
    folder: Path, tmp_path: Path, expected: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 3, kill)
        train(folder, tmp_path / "out")
    assert states(tmp_path / "out") == [2]
    monkeypatch.setattr("slimqwen.training.distil.REVISION", 0)
    begun: list[int] = []
    before_step(monkeypatch, 0, lambda _: begun.append(0))
    assert same_weights(train(folder, tmp_path / "out"), expected)
    assert begun and "was left behind by other work" in capsys.readouterr().err


# --- states written meanwhile -----------------------------------------------------------------------------------------


def test_training_goes_on_while_a_state_is_written(folder: Path, tmp_path: Path, expected: Path) -> None:
    """The state of step 2 is written during step 3, when the weights are no longer those of step 2."""
    may_write, weights = threading.Event(), []
    original = dcp.HuggingFaceStorageWriter.write_data

    def wait_and_write(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return original(*arguments)

    def note_weights(trainer: Trainer) -> None:
        weights.append({name: parameter.detach().clone() for name, parameter in trainer.parameters.items()})
        assert states(tmp_path / "out") == []  # it is still being written

    def write_now(trainer: Trainer) -> None:
        assert any(not torch.equal(weights[0][name], tensor) for name, tensor in trainer.parameters.items())
        may_write.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp.HuggingFaceStorageWriter, "write_data", wait_and_write)
        before_step(patch, 2, note_weights)
        before_step(patch, 3, write_now)
        before_step(patch, 4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Preempted, match="after step 5, state saved"):
            train(folder, tmp_path / "out", async_save=True, keep_states=3)
    assert states(tmp_path / "out") == [2, 4, 5]
    (file,) = (tmp_path / ".out.state" / "step-000000002").glob("*.safetensors")
    saved = load_file(file)
    assert weights[0] and all(torch.equal(saved[f"parameter.{name}"], tensor) for name, tensor in weights[0].items())
    train(folder, tmp_path / "out")
    assert same_weights(tmp_path / "out", expected) and metrics(tmp_path / "out") == metrics(expected)


@pytest.mark.parametrize("release", [(2, 11, 0), (2, 13, 0)])
def test_states_are_written_with_a_stager_that_closes_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path, release: tuple[int, ...]
) -> None:
    """As PyTorch's of 2.11 and 2.12 does after one state. Where it is taken for one that does not, the second state fails."""
    stage = DefaultStager._stage

    def stage_and_close(self: DefaultStager, tensors: Any, **options: Any) -> Any:
        copies = stage(self, tensors, **options)
        self._state_dict_stager.close()
        return copies

    monkeypatch.setattr(DefaultStager, "_stage", stage_and_close)
    monkeypatch.setattr(state, "release", lambda package: release)
    if release >= state.REUSABLE_STAGER:
        with pytest.raises(KeyError):
            train(folder, tmp_path / "out", async_save=True)
        return
    train(folder, tmp_path / "out", async_save=True)
    assert same_weights(tmp_path / "out", expected) and metrics(tmp_path / "out") == metrics(expected)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_reported_and_costs_no_state(folder: Path, tmp_path: Path, asynchronous: bool) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill_disk(_: Trainer) -> None:
        patch.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)

    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 3, fill_disk)
        with pytest.raises(StageFailed, match=r"step-000000004 could not be written: the disk is full"):
            train(folder, tmp_path / "out", async_save=asynchronous)
    assert states(tmp_path / "out") == [2]
    assert not list((tmp_path / ".out.state").glob(".*.partial"))


# --- garbage collection -----------------------------------------------------------------------------------------------


def test_garbage_is_collected_between_steps_and_never_in_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path
) -> None:
    """Each step makes more objects than automatic collection lets pass."""
    places: list[str] = []
    original = Trainer.step

    def step(self: Trainer, number: int) -> dict[str, float]:
        places.append(f"step {number}")
        objects = [[] for _ in range(20 * gc.get_threshold()[0])]
        values = original(self, number)
        places.append("between" if objects else "")
        return values

    def note(phase: str, _: Mapping[str, int]) -> None:
        if phase == "start" and places:
            places.append("collection")

    monkeypatch.setattr(Trainer, "step", step)
    gc.callbacks.append(note)
    try:
        train(folder, tmp_path / "out")
        found = list(places)
    finally:
        gc.callbacks.remove(note)
    steps = [part for number in range(STEPS) for part in (f"step {number}", "between", "collection")]
    assert found[: len(steps)] == steps
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert same_weights(tmp_path / "out", expected)


# --- bad steps --------------------------------------------------------------------------------------------------------


def test_a_spike_is_a_multiple_of_the_median() -> None:
    guard = Guard(spike_factor=2.0)
    for loss in [9.0] + [1.0, 3.0] * (FEWEST // 2 - 1):
        guard.accept(loss)
    assert guard.problem(100.0, 1.0) is None  # too few to compare with
    guard.accept(3.0)  # 1 seven times, 3 eight times, 9
    assert guard.problem(6.0, 1.0) is None
    assert guard.problem(6.01, 1.0) == f"loss 6.01 is more than 2 x 3, the median of the last {FEWEST}"
    assert guard.problem(1.0, float("inf")) == "loss 1, gradient norm inf"
    assert guard.problem(float("nan"), 1.0) == "loss nan, gradient norm 1"
    for _ in range(WINDOW):
        guard.accept(0.1)
    assert guard.problem(0.3, 1.0) is not None
    assert Guard(spike_factor=None).problem(1e30, 1.0) is None
    other = Guard(2.0)
    other.restore(GuardRecord.model_validate_json(guard.record().model_dump_json()))
    assert other.record() == guard.record() and len(other.losses) == WINDOW


def test_rows_come_later_after_a_rollback() -> None:
    """Steps of 4 rows. Step 3 was bad and 2 saved: rows 8..15 go. Then step 6, with 4 saved: what came at 4..6 goes."""
    guard = Guard(None)
    guard.restore(GuardRecord(rollbacks=[Rollback(step=2, bad_step=3, rows=8, problem="")]))
    assert [4 * step + guard.rows_left_out(step) for step in range(5)] == [0, 4, 16, 20, 24]
    guard.rollbacks.append(Rollback(step=4, bad_step=6, rows=12, problem=""))
    assert [4 * step + guard.rows_left_out(step) for step in range(6)] == [0, 4, 16, 20, 36, 40]


def spoil(patch: pytest.MonkeyPatch, bad: Mapping[int, float]) -> list[list[int]]:
    """Multiply the loss of the batch whose first training row has number n by bad[n]; (step, first row) of each step."""
    seen: list[list[int]] = []
    step, backward = Trainer.step, Trainer.backward

    def noted(self: Trainer, number: int) -> dict[str, float]:
        seen.append([number, self.rows_of(number).first_row])
        return step(self, number)

    def spoiled(self: Trainer, *arguments: Any) -> Any:
        loss, *rest = backward(self, *arguments)
        return loss * bad.get(seen[-1][1], 1.0), *rest

    patch.setattr(Trainer, "step", noted)
    patch.setattr(Trainer, "backward", spoiled)
    return seen


def test_training_goes_back_and_leaves_out_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 12..15 (step 3) and, later, 28..31 (then step 5) are bad; states are saved after 2, 4 and 6 steps."""
    bad, changes = {12: torch.nan, 28: torch.nan}, {"bad_steps": "roll_back", "steps": 8}
    with monkeypatch.context() as patch:
        seen = spoil(patch, bad)
        straight = train(folder, tmp_path / "straight" / "out", **changes)
    assert seen == [
        *[[0, 0], [1, 4], [2, 8], [3, 12]],  # back to step 2, without rows 8..15
        *[[2, 16], [3, 20], [4, 24], [5, 28]],  # back to step 4, without rows 24..31
        *[[4, 32], [5, 36], [6, 40], [7, 44]],
    ]
    said = capsys.readouterr().err
    assert "optimiser step 3 is bad: loss nan" in said and "back to step 2, leaving out the 8 rows since" in said
    lines = metrics(straight)
    assert [line["step"] for line in lines] == list(range(8)) and not any("skipped" in line for line in lines)
    rollbacks = {line["step"]: line["rollbacks"] for line in lines if "rollbacks" in line}
    assert {step: [(b["bad_step"], b["rows"]) for b in found] for step, found in rollbacks.items()} == {
        2: [(3, 8)],
        4: [(5, 8)],
    }
    assert "loss nan" in rollbacks[2][0]["problem"]

    # Killed before anything was saved after the second rollback: the state that it went back to knows of both.
    with monkeypatch.context() as patch:
        spoil(patch, bad)
        original = Trainer.step

        def die(self: Trainer, number: int) -> dict[str, float]:
            if number == 5 and len(self.guard.rollbacks) == 2:
                raise Killed
            return original(self, number)

        patch.setattr(Trainer, "step", die)
        with pytest.raises(Killed):
            train(folder, tmp_path / "killed" / "out", **changes)
    with monkeypatch.context() as patch:
        seen = spoil(patch, bad)
        resumed = train(folder, tmp_path / "killed" / "out", **changes)
    assert seen == [[4, 32], [5, 36], [6, 40], [7, 44]]
    assert same_weights(resumed, straight) and metrics(resumed) == lines


def test_going_back_has_an_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spoil(monkeypatch, dict.fromkeys(range(0, 1000, 4), torch.nan))
    with pytest.raises(StageFailed, match="before optimiser step 0: loss nan"):
        train(folder, tmp_path / "out", bad_steps="roll_back")
    assert [row for _, row in seen] == list(range(0, 4 * (MAX_ROLLBACKS + 1), 4))


def test_a_spike_is_skipped_and_resuming_decides_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 18 spikes. The resumed process has seen one loss before it: the state remembers the others."""
    changes = {"bad_steps": {"action": "skip", "spike_factor": 1.5}, "steps": 20, "save_every": "17 steps"}
    spoil(monkeypatch, {18 * BATCH_SIZE: 4.0})
    straight = train(folder, tmp_path / "straight" / "out", **changes)
    assert [line["step"] for line in metrics(straight) if "skipped" in line] == [18]
    with monkeypatch.context() as patch:
        before_step(patch, 18, kill)
        with pytest.raises(Killed):
            train(folder, tmp_path / "killed" / "out", **changes)
    resumed = train(folder, tmp_path / "killed" / "out", **changes)
    assert same_weights(resumed, straight) and metrics(resumed) == metrics(straight)


# --- held-out text ----------------------------------------------------------------------------------------------------

EVALUATED = {"evaluate_every": f"{2 * STEP_TOKENS} tokens", "evaluate_tokens": 7 * SEQUENCE_LENGTH}
MEASURED = {"heldout_lm", "heldout_kd", "heldout_mtp_lm", "heldout_mtp_kd", "heldout_top1_agreement", "acc_0", "acc_1"}


def test_measuring_on_the_way_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path
) -> None:
    original = heldout.HeldOut.measure

    def measure(self: heldout.HeldOut, trainer: Trainer) -> dict[str, float]:
        state = torch.get_rng_state()
        values = original(self, trainer)
        assert torch.equal(torch.get_rng_state(), state) and trainer.student.model.training
        return values

    monkeypatch.setattr(heldout.HeldOut, "measure", measure)
    out = train(folder, tmp_path / "out", **EVALUATED)
    assert same_weights(out, expected)
    lines = metrics(out)
    assert [line["step"] for line in lines if line.keys() >= MEASURED] == [1, 3, 5]
    assert [{key: line[key] for key in line.keys() - MEASURED} for line in lines] == metrics(expected)

    # The last measurement is of the weights that training ended with: those that the stage `evaluate` would see.
    rows = heldout_rows(folder / "tokens", SEQUENCE_LENGTH, EVALUATED["evaluate_tokens"])
    assert len(rows.tokens) == 7

    def said(name: Path) -> Any:
        checkpoint = Checkpoint(name)
        return record(load(name), checkpoint.family, checkpoint.config, rows, batch_size=4, title="")

    means = compare(said(out), said(folder / "teacher"))
    found = {name.removeprefix("heldout_"): lines[-1][name] for name in MEASURED if name.startswith("heldout_")}
    assert found == pytest.approx(means, rel=FORWARD)
    assert 0.0 <= lines[-1]["acc_1"] <= lines[-1]["acc_0"] <= 1.0


def train_evaluated(folder: Path, out: Path) -> None:
    heldout.NEW_TOKENS = 8
    train(folder, out, steps=4, async_save=True, reshard_student=False, **EVALUATED)


def test_ranks_measure_together(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows on two ranks, one with a row of padding. That training is not touched the kills of test_parallel show."""
    monkeypatch.setattr(heldout, "NEW_TOKENS", 8)
    alone = train(folder, tmp_path / "alone" / "out", steps=4, **EVALUATED)
    run_ranks(2, train_evaluated, folder, tmp_path / "pair" / "out")
    for line, wanted in zip(metrics(tmp_path / "pair" / "out"), metrics(alone), strict=True):
        assert line.pop("run") == wanted.pop("run")
        assert line == pytest.approx(wanted, rel=TRAINED)


def test_a_training_that_resumes_with_other_threads_prints_a_note(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 2, kill)
        train(folder, tmp_path / "out", steps=3)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads + 1)
        train(folder, tmp_path / "out", steps=3)
    said = capsys.readouterr().err
    assert f"the training of {tmp_path / 'out'} was begun with {threads} thread" in said
    assert f"goes on with {threads + 1} threads" in said


# --- who is told ------------------------------------------------------------------------------------------------------


def test_tensorboard_after_kill_and_resume(folder: Path, tmp_path: Path, expected: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 3, kill)
        with pytest.raises(Killed):
            train(folder, tmp_path / "out", loggers=["tensorboard"])
    train(folder, tmp_path / "out", loggers=["tensorboard"])
    (run,) = (tmp_path / "tensorboard").iterdir()
    assert run.name == "slimqwen-stage-1"
    events = EventAccumulator(str(run))
    events.Reload()
    lines = metrics(expected)
    for name in ("lm", "kd", "learning_rate"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert metrics(tmp_path / "out") == lines


class FakeRun:
    """What wandb.init and trackio.init return, as far as we use it."""

    def __init__(self, **named: Any) -> None:
        self.named = named
        self.logged: dict[int, Mapping[str, float]] = {}
        self.finished = False

    def log(self, values: Mapping[str, float], step: int) -> None:
        assert step not in self.logged and all(isinstance(value, int | float) for value in values.values())
        self.logged[step] = values

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_server_gets_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    runs: list[FakeRun] = []

    def init(**named: Any) -> FakeRun:
        runs.append(FakeRun(**named))
        return runs[-1]

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init, __spec__=SimpleNamespace()))

    def steps(state_folder: Path, begin: int, until: int) -> None:
        opened = open_loggers([name], tmp_path, state_folder, "run-stage-1", {"batch_size": 4})
        with MetricsLog(tmp_path / "metrics.jsonl", "run", 1, opened) as log:
            log.rewind(begin)
            for step in range(begin, until):
                log.append(step, {"tokens": step, "lm": 1.5, "rollbacks": []})

    steps(tmp_path / "state", 0, 5)
    steps(tmp_path / "state", 3, 7)  # resumed from an older state
    steps(tmp_path / "another", 0, 2)  # begun anew
    first, second, third = runs
    assert [sorted(run.logged) for run in runs] == [[0, 1, 2, 3, 4], [5, 6], [0, 1]]
    assert first.logged[0] == {"tokens": 0, "lm": 1.5}
    assert first.named == second.named and first.named["resume"] == "allow" and first.named["name"].startswith("run-")
    assert third.named["name"] != first.named["name"]
    assert first.named["config"] == {"batch_size": 4} and all(run.finished for run in runs)
    assert ("id" in first.named) == (name == "wandb")


def test_a_library_that_is_not_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"names wandb, .*pip install 'slimqwen\[wandb\]'"):
        train(folder, tmp_path / "out", loggers=["wandb"])
    assert list(tmp_path.iterdir()) == []
    check_loggers([])


# --- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307e12),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_the_names_of_devices(name: str, flops: float | None) -> None:
    assert peak_of(name) == flops


def test_mfu_is_logged_where_the_peak_is_known(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], expected: Path
) -> None:
    """Recomputation is no progress: it does not count."""
    monkeypatch.setattr(speed, "dense_bf16_flops", lambda device: 1e9)
    out = train(folder, tmp_path / "out", recompute_activations=True)
    student, teacher = (Checkpoint(folder / name) for name in ("student", "teacher"))
    flops = 3 * forward_flops(student.family, student.config, SEQUENCE_LENGTH)
    flops += forward_flops(teacher.family, teacher.config, SEQUENCE_LENGTH)
    for line in map(json.loads, (out.parent / "metrics.jsonl").read_text().splitlines()):
        assert line["mfu"] == pytest.approx(flops * STEP_TOKENS / (line["seconds"] * 1e9), rel=1e-9)
        assert line["tokens_per_second"] == pytest.approx(STEP_TOKENS / line["seconds"], rel=1e-9)
        assert line["memory_bytes"] > 50e6
    said = capsys.readouterr().err
    assert "mfu " in said and "memory " in said and "tokens/s" in said
    assert "mfu" not in metrics(expected)[0]
