"""Weights, gradients and moments in the host's memory: the same training, on one process without torchrun. Not run on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rounding import TRAINED, assert_trained_alike
from test_optimizer import killed_and_resumed, recipe, same_weights, weights
from test_optimizer import train as train_alone
from test_trainer import metrics, train
from tiny import write_tiny_checkpoint, write_tiny_tokens
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.model.model import allocate, load, weightless
from slimqwen.parallel import ranks as ranks_module
from slimqwen.parallel.ranks import join_ranks, shard
from slimqwen.recipe import OptimizerRecipe
from slimqwen.training.optimizer import build_optimizer, check_optimizer, freeze_untrained, parts_of
from slimqwen.training.state import _unwrap

pytestmark = pytest.mark.rounding

TWO_LAYERS = {"num_hidden_layers": 2, "full_attention_interval": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student`, a `teacher` of another width, and `tokens`; read-only."""
    folder = tmp_path_factory.mktemp("offload")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "student", tokenizer=tokenizer, **TWO_LAYERS)
    write_tiny_checkpoint(folder / "teacher", seed=1, tokenizer=tokenizer, hidden_size=40, num_experts=4, **TWO_LAYERS)
    return folder


def test_it_is_the_training_with_everything_on_the_device(folder: Path, tmp_path: Path) -> None:
    """With a teacher, micro-batches, an average and a part that is frozen; measured on held-out text on the way."""
    changes: dict[str, Any] = {"train": "no_experts", "ema_decay": 0.25, "micro_batch_size": 2}
    changes |= {"evaluate_every": "3 steps", "evaluate_tokens": 64}
    plain = train(folder, tmp_path / "plain" / "out", **changes)
    for offload in ("student", "all"):
        found = train(folder, tmp_path / offload / "out", **changes, offload=offload)
        assert not dist.is_initialized()
        assert_trained_alike(weights(found), weights(plain))
        for line, other in zip(metrics(tmp_path / offload), metrics(tmp_path / "plain"), strict=True):
            assert line.keys() == other.keys()
            numbers = [key for key, value in line.items() if isinstance(value, float) and not key.startswith("acc")]
            assert {key: line[key] for key in numbers} == pytest.approx(
                {key: other[key] for key in numbers}, rel=TRAINED
            )


def test_resumed_is_uninterrupted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train_alone(folder, tmp_path / "expected" / "out", {"offload": "student"})
    resumed = killed_and_resumed(folder, tmp_path / "out", {"offload": "student"}, monkeypatch)
    assert same_weights(resumed, expected)
    assert_trained_alike(weights(expected), weights(train_alone(folder, tmp_path / "plain" / "out", {})))


def test_what_is_sharded_lies_in_the_hosts_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over one rank, by FSDP's policy, pinned beside a GPU only; the few float32 weights that are whole, and buffers, on the device.

    The meta device stands for a GPU.
    """
    policies = []
    wrap = ranks_module.fully_shard
    monkeypatch.setattr(
        ranks_module, "fully_shard", lambda *args, **settings: (policies.append(settings), wrap(*args, **settings))[1]
    )
    cpu, gpu = torch.device("cpu"), torch.device("meta")
    with join_ranks(cpu, offloads=True) as ranks:
        assert (ranks.size, ranks.rank, ranks.is_first) == (1, 0, True)
        model = weightless(Checkpoint(folder / "student"), torch.float32, cpu)
        shard(model, ranks, mixed_precision=True, reshard_after_forward=True, offloads=True)
        allocate(model, gpu, sharded_on=cpu)
        sharded = {name for name, tensor in model.tensors().items() if isinstance(tensor, DTensor)}
        for name, tensor in model.held().items():
            assert tensor.device == (cpu if name in sharded else gpu), name
        others = model.tensors().keys() - sharded
        assert len(sharded) > len(others) and all(name.endswith(model.family.float32_tensors) for name in others)
    assert len(policies) == 2 + 1 + 1  # layers, MTP's, and what is around them
    assert all(settings["offload_policy"] == CPUOffloadPolicy(pin_memory=False) for settings in policies)


def test_what_does_not_go_with_it(folder: Path) -> None:
    student = Checkpoint(folder / "student")
    check_optimizer(OptimizerRecipe(), student, offloads=True)
    with pytest.raises(UserError, match=r"muon does not go with execution.offload"):
        check_optimizer(OptimizerRecipe(kind="muon"), student, offloads=True)


# --- 8 bits: with torchao itself, where it is installed ----------------------------------------------------------------


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, its step not compiled, which takes a minute per shape."""
    pytest.importorskip("torchao.optim", reason="adamw_8bit is torchao's, which is not installed")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("torchao")
def test_moments_in_8_bits_take_a_byte_and_a_scale_for_256(folder: Path) -> None:
    settings = recipe(train="no_experts", optimizer="adamw_8bit")
    checkpoint = Checkpoint(folder / "student")
    model = load(checkpoint.folder)
    parts = parts_of(checkpoint.family, checkpoint.config)
    parameters = freeze_untrained(model, parts, settings["recipe"].trained_parts, with_mtp=True)
    optimizer = build_optimizer(parameters, parts, settings["recipe"].optimizer)
    large = {name: parameter for name, parameter in parameters.items() if parameter.numel() % 4096 == 0}
    assert large and not any(".experts." in name for name in parameters)
    for parameter in large.values():
        inner = _unwrap("exp_avg", optimizer.state[parameter]["exp_avg"])
        held = {key: tensor.numel() * tensor.itemsize for key, tensor in inner.items() if "qmap" not in key}
        assert sum(held.values()) == parameter.numel() + 4 * parameter.numel() // 256, held


@pytest.mark.usefixtures("torchao")
def test_moments_in_8_bits_in_the_hosts_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a frozen part, with an average: as without offloading, and resumed as uninterrupted."""
    changes = {"optimizer": "adamw_8bit", "train": "no_experts", "ema_decay": 0.5}
    plain = train_alone(folder, tmp_path / "plain" / "out", changes)
    resumed = killed_and_resumed(folder, tmp_path / "out", changes | {"offload": "student"}, monkeypatch)
    assert_trained_alike(weights(resumed), weights(plain))
    again = train_alone(folder, tmp_path / "again" / "out", changes | {"offload": "student"})
    assert same_weights(resumed, again)
