"""The step before the training: it changes nothing, measures what a step takes, and says what to do where that is too much."""

from pathlib import Path
from typing import Any

import pytest
import torch
from settings import sections
from tiny import VOCAB_SIZE, tiny_config, tiny_stream

from slimqwen.core.errors import StageFailed
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.model.live_bytes import measured_peak
from slimqwen.model.model import initialise
from slimqwen.recipe import DistilRecipe
from slimqwen.training import dry_run as module
from slimqwen.training.dry_run import dry_run, held_bytes, predict_memory, remedies
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Span, Student, Trainer

SEQUENCE_LENGTH = 64  # the reference DeltaNet pads to it


def trainer(folder: Path, **changes: Any) -> Trainer:
    config = tiny_config(num_hidden_layers=2, full_attention_interval=2)
    tokens = torch.randint(VOCAB_SIZE, (1300,), generator=torch.Generator().manual_seed(0)).tolist()
    stream = tiny_stream(folder, [tokens], SEQUENCE_LENGTH)
    usual = {"tokens": 1280, "batch_size": 2, "warmup": "0 steps", "loss_chunk_tokens": 24}
    teacher = LiveTeacher(initialise(config, seed=1).eval(), teaches_mtp=False)
    student = Student(initialise(config, seed=0), QWEN3_NEXT, config)
    return Trainer(student, teacher, stream, span=Span(0, 10, 10), **sections(DistilRecipe, usual | changes))


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 1}, {"ema_decay": 0.9, "recompute_activations": True}])
def test_training_after_it_is_training_without_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Bit for bit: weights, the optimiser's state, what is reported, and the random numbers that come next."""
    with_it, without = trainer(tmp_path, **changes), trainer(tmp_path, **changes)
    torch.manual_seed(7)
    was_training = with_it.student.model.training
    dry_run(with_it)
    assert with_it.student.model.training == was_training
    assert all(parameter.grad is None for parameter in with_it.parameters.values())
    random = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(random, torch.rand(3))
    for one in (with_it, without):
        one.student.model.train()
    assert [with_it.step(step) for step in range(2)] == [without.step(step) for step in range(2)]
    for name, parameter in without.parameters.items():
        mine = with_it.parameters[name]
        assert torch.equal(mine, parameter), name
        ours, theirs = with_it.optimizer.state[mine], without.optimizer.state[parameter]
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 1}])
def test_it_takes_what_a_step_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    one = trainer(tmp_path, **changes)
    with measured_peak(one.device) as dry:
        dry_run(one)
    assert f"{changes.get('micro_batch_size', 2)} x 64 tokens" in capsys.readouterr().err
    one.student.model.train()
    with measured_peak(one.device) as real:
        one.step(0)
    assert dry.extra_bytes == pytest.approx(real.extra_bytes, rel=0.03)
    assert held_bytes(one) + real.extra_bytes == pytest.approx(predict_memory(one).peak_bytes, rel=0.15)


def test_too_little_memory_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(tmp_path)

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "_run_passes", fails)
    with pytest.raises(StageFailed) as failure:
        dry_run(one)
    sentence = str(failure.value)
    assert "2 x 64 tokens does not fit cpu" in sentence and sentence.endswith(".") and sentence.count(". ") == 0
    for advice in ("execution.micro_batch_size: 1 (", "execution.recompute_activations: true ("):
        assert advice in sentence
    assert "loss_chunk_tokens" not in sentence and "GPUs" not in sentence  # as small as it gets, and on a CPU
    assert all(parameter.grad is None for parameter in one.parameters.values())


def test_memory_that_fails_during_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: in the middle of a forward pass, with gradients of the micro-batch before."""
    one = trainer(tmp_path, batch_size=4, micro_batch_size=2)
    calls = []

    def fails(module: torch.nn.Module, inputs: object) -> None:
        calls.append(inputs)
        if len(calls) == 4:  # counts, counts, first, second
            raise torch.OutOfMemoryError("CUDA out of memory.")

    one.student.model.backbone.get_decoder().layers[1].register_forward_pre_hook(fails)
    with pytest.raises(
        StageFailed, match=r"failed at .* predicted; try execution.micro_batch_size: 1 \(.* predicted\)"
    ):
        dry_run(one)
    assert all(parameter.grad is None for parameter in one.parameters.values())


def test_a_growing_batch_is_tried_at_its_largest(tmp_path: Path) -> None:
    one = trainer(tmp_path, batch_size_ramp={"start": 1, "tokens": 320})
    assert one.course.rows(0) == 1
    assert predict_memory(one).settings.micro_batch_size == 2


def test_a_batch_that_its_parts_do_not_fill(tmp_path: Path) -> None:
    """Six rows, a rank's share of twelve, four at a time: two passes, and gradients wait for the second."""
    one = trainer(tmp_path, batch_size=6)
    one.micro_batch_size = 4
    assert predict_memory(one).settings.micro_batches == 2


def test_on_a_gpu_the_loss_and_more_gpus_are_advised_too(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    settings = predict_memory(one).settings.model_copy(
        update={"device": "cuda", "sequence_length": 4096, "loss_chunk_tokens": 4096, "recompute_activations": True}
    )
    advice = remedies(one, settings)
    assert "execution.loss_chunk_tokens: 1024 (" in advice and "2 GPUs (" in advice and "recompute" not in advice
