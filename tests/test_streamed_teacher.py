"""A live teacher that goes layer by layer: the distributions of one that is in memory, its weights read once per step."""

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import FORWARD, GRADIENT, TRAINED, error
from test_trainer import BATCH_SIZE, SEQUENCE_LENGTH, STEPS, metrics, train, trainer
from tiny import tiny_tokens, write_tiny_checkpoint, write_tiny_tokens

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.data.stream import Batch
from slimqwen.model.model import load
from slimqwen.parallel.ranks import ALONE
from slimqwen.recipe import Execution
from slimqwen.training import streamed_teacher
from slimqwen.training.interrupt import Interrupts, StepInterrupted
from slimqwen.training.streamed_teacher import StreamedTeacher, goes_layer_by_layer
from slimqwen.training.teacher import LiveTeacher

pytestmark = pytest.mark.rounding

EXECUTION = Execution(device="cpu", batch_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student`, a `teacher` of another width, and `tokens`; read-only."""
    folder = tmp_path_factory.mktemp("streamed")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "student", tokenizer=tokenizer)
    write_tiny_checkpoint(folder / "teacher", seed=1, tokenizer=tokenizer, hidden_size=40, num_experts=4)
    return folder


def streamed(folder: Path, teaches_mtp: bool, sequence_length: int = SEQUENCE_LENGTH) -> StreamedTeacher:
    return StreamedTeacher(
        Checkpoint(folder / "teacher"),
        EXECUTION,
        teaches_mtp=teaches_mtp,
        rows=BATCH_SIZE,
        sequence_length=sequence_length,
        dtype=torch.float32,
    )


def test_the_signal_is_that_of_the_teacher_in_memory(folder: Path) -> None:
    """Of both heads, prepared or not, in any micro-batches; with padding at a row's end."""
    live = LiveTeacher(load(folder / "teacher"), teaches_mtp=True)
    tokens = tiny_tokens(3)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, -4:] = False
    batch = Batch(tokens, mask)
    teacher = streamed(folder, True, tokens.shape[1] - 1)
    teacher.prepare(batch)
    for piece in (*batch.split(2), Batch(tiny_tokens(1, seed=7))):
        found, expected = teacher.signal(piece), live.signal(piece)
        assert torch.equal(found.head, expected.head)
        assert error(found.hidden, expected.hidden) < FORWARD
        assert found.mtp_hidden is not None and expected.mtp_hidden is not None
        assert error(found.mtp_hidden, expected.mtp_hidden) < FORWARD


@pytest.mark.parametrize("mtp_target", ["main", "mtp"])
def test_steps_are_those_of_a_teacher_in_memory(folder: Path, mtp_target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four micro-batches a step, and each of the teacher's tensors read once in it."""
    changes = {"mtp_target": mtp_target, "micro_batch_size": 1}
    usual, one = trainer(folder, **changes), trainer(folder, **changes)
    usual.teacher = LiveTeacher(load(folder / "teacher"), teaches_mtp=mtp_target == "mtp")
    one.teacher = streamed(folder, mtp_target == "mtp")
    reads: Counter[str] = Counter()
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (reads.update([name]), read(self, name))[1])
    for step in range(2):
        reads.clear()
        assert one.step(step) == pytest.approx(usual.step(step), rel=TRAINED if step else GRADIENT)
        assert set(reads.values()) == {1}
        layers = {name for name in reads if name.startswith("model.layers.")}
        assert layers >= {
            name for name in Checkpoint(folder / "teacher").specs if ".self_attn." in name and "mtp" not in name
        }


def test_a_signal_ends_a_step_while_the_teacher_runs(folder: Path) -> None:
    """After the chunk under way, where this process trains alone; the same step can then be made."""
    one = trainer(folder, micro_batch_size=1)
    one.teacher = streamed(folder, teaches_mtp=False)
    before = {name: tensor.detach().clone() for name, tensor in one.parameters.items()}
    looks: list[int] = []
    one.interrupts = Interrupts(received=lambda: looks.append(1) or signal.SIGTERM * (len(looks) == 2))  # type: ignore[func-returns-value]
    with pytest.raises(StepInterrupted):
        one.step(0)
    assert len(looks) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.parameters.items())
    one.interrupts = Interrupts()
    assert one.step(0)["kd"] > 0


def test_a_training_and_its_measurements_are_those_of_a_teacher_in_memory(folder: Path, tmp_path: Path) -> None:
    changes = {"evaluate_every": "3 steps", "evaluate_tokens": 64, "micro_batch_size": 2}
    train(folder, tmp_path / "live" / "out", **changes)
    train(folder, tmp_path / "streamed" / "out", **changes, streaming_teacher=True)
    expected, found = metrics(tmp_path / "live"), metrics(tmp_path / "streamed")
    assert len(found) == len(expected) >= STEPS
    assert any("heldout_kd" in line for line in found)
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        numbers = [key for key, value in line.items() if isinstance(value, float) and not key.startswith("acc")]
        assert {key: line[key] for key in numbers} == pytest.approx({key: other[key] for key in numbers}, rel=TRAINED)


def test_it_goes_layer_by_layer_where_it_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By weights, gradients and moments against all of the memory; what is trained takes 16 bytes, what is frozen its own."""
    teacher, student = Checkpoint(folder / "teacher"), load(folder / "student")
    teacher_bytes = 4 * sum(tensor.numel() for tensor in load(folder / "teacher").tensors().values())
    numbers = sum(tensor.numel() for tensor in student.tensors().values())

    def chosen(memory: int, **settings: Any) -> bool:
        monkeypatch.setattr(streamed_teacher, "limit_bytes", lambda: memory)
        return goes_layer_by_layer(teacher, student, Execution(device="cpu", **settings), torch.float32, ALONE)

    needed = teacher_bytes + 16 * numbers
    assert not chosen(needed)
    assert chosen(needed - 1)
    assert "the teacher goes layer by layer (execution.streaming_teacher)" in capsys.readouterr().err
    assert chosen(needed, streaming_teacher=True) and not chosen(1, streaming_teacher=False)
    student.requires_grad_(False)
    assert not chosen(teacher_bytes + 4 * numbers) and chosen(teacher_bytes + 4 * numbers - 1)
