"""Ranks that share the experts of a block (gloo): the same as one rank that has them all, whatever the routing."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ranks import Ranks, run_ranks
from rounding import GRADIENT, TRAINED, assert_trained_alike, error
from safetensors.torch import load_file, save_file
from settings import sections
from tiny import tiny_tokens, write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE, GLM4_MOE, QWEN3_MOE
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.model.model import MtpCausalLM, load
from slimqwen.model.routing import observe_routing
from slimqwen.parallel.expert_parallel import check_expert_ranks
from slimqwen.parallel.ranks import add_up_gradients, join_ranks, sharded_dim
from slimqwen.parallel.sharded_checkpoint import export, load_sharded, whole
from slimqwen.recipe import DistilRecipe, TextSettings
from slimqwen.training import rank_log
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.metrics import MetricsLog
from slimqwen.training.trainer import Trainer

SEQUENCE_LENGTH = 16
BATCH_SIZE = 8
STEPS = 4
TWO_LAYERS = {"num_hidden_layers": 2, "full_attention_interval": 2}


def starve(folder: Path) -> None:
    """Give a GLM checkpoint routers whose correction bias lets no token choose an expert of the second half."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.arange(len(tensor)) < len(tensor) // 2).mul_(10.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- one forward and backward pass, every family -----------------------------------------------------------------------


def loss_of(model: MtpCausalLM, tokens: Tensor, row_weights: Tensor) -> Tensor:
    """A number that depends on all outputs at the rows that count, and on every router."""
    blocks = model.family.moe_blocks(model.config)
    with observe_routing(model, blocks) as seen:
        hidden = model(tokens)
    assert seen.keys() == {block.name for block in blocks}
    outputs = [hidden.main, *([hidden.mtp] if hidden.mtp is not None else [])]
    weights = row_weights[:, None, None]
    logits = [routing.logits.reshape(*outputs[0].shape[:2], -1) for routing in seen.values()]
    return sum(((weights * tensor).sin().sum() for tensor in (*outputs, *logits)), torch.zeros(()))


def compare_with_one_rank(folder: Path, names: list[str]) -> None:
    """Loading, outputs, gradients and export; the second rank's only row is padding and does not count."""
    device, read = torch.device("cpu"), Checkpoint.read

    with join_ranks(device, expert_ranks=2) as ranks:
        for name in names:
            names_read: set[str] = set()
            Checkpoint.read = lambda self, name, seen=names_read: (seen.add(name), read(self, name))[1]  # type: ignore
            checkpoint, alone = Checkpoint(folder / name), load(folder / name)
            names_read.clear()
            model = load_sharded(checkpoint, ranks, torch.float32, device, trains=True, reshard_after_forward=True)
            half = checkpoint.config["num_experts"] // 2
            read_experts = {checkpoint.specs[read_name].expert for read_name in names_read} - {None}
            assert read_experts <= {ranks.rank * half + expert for expert in range(half)}, name
            experts = {own: tensor for own, tensor in model.tensors().items() if ".experts." in own}
            assert experts and all(tensor.to_local().shape[0] == half for tensor in experts.values())

            tokens, row_weights = tiny_tokens(2), torch.tensor([1.0, 0.0])
            tokens[1] = 0
            loss_of(alone, tokens, row_weights).backward()
            own_row = slice(ranks.rank, ranks.rank + 1)
            loss_of(model, tokens[own_row], row_weights[own_row]).backward()
            add_up_gradients(model.tensors().values(), ranks)
            expected = alone.tensors()
            for own, tensor in model.tensors().items():
                gradient = expected[own].grad
                if gradient is not None:
                    assert error(whole(tensor.grad), gradient) < GRADIENT, f"{name}: {own}"

            (folder / f"{name}-exported").mkdir(exist_ok=True)
            export(model, folder / f"{name}-exported" if ranks.is_first else None, checkpoint)
            ranks.wait()


def test_every_family_in_two_halves(tmp_path: Path) -> None:
    names = list(FAMILIES_NATIVE)
    for name, native in FAMILIES_NATIVE.items():
        write_tiny_checkpoint(tmp_path / name, native=native, layout="fused" if name == "qwen3_moe" else "per_expert")
    starve(tmp_path / "glm4_moe")
    run_ranks(2, compare_with_one_rank, tmp_path, names)
    for name in names:
        before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in (name, f"{name}-exported"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[tensor], after[tensor]) for tensor in before), name


def compare_split_by_another_dimension(folder: Path) -> None:
    """Six experts on four ranks, and a gate of one row: neither is padded, and loading, gradients and export are those of one rank."""
    device, checkpoint = torch.device("cpu"), Checkpoint(folder / "six")
    with join_ranks(device) as ranks:
        alone = load(folder / "six")
        model = load_sharded(checkpoint, ranks, torch.float32, device, trains=True, reshard_after_forward=True)
        sharded: dict[str, Any] = {name: found for name, found in model.tensors().items() if isinstance(found, DTensor)}
        assert all(found.to_local().numel() * ranks.size == found.numel() for found in sharded.values())
        by_column = {name for name, found in sharded.items() if found.placements == (Shard(1),)}
        assert {name.rpartition(".experts.")[2] for name in by_column if ".experts." in name} == {
            "gate_up_proj",
            "down_proj",
        }
        assert any(name.endswith("shared_expert_gate.weight") for name in by_column)
        tokens, row_weights = tiny_tokens(4), torch.ones(4)
        own_row = slice(ranks.rank, ranks.rank + 1)
        loss_of(alone, tokens, row_weights).backward()
        loss_of(model, tokens[own_row], row_weights[own_row]).backward()
        expected = alone.tensors()
        for name, found in sharded.items():
            assert error(whole(found.detach()), expected[name].detach()) == 0.0, name
            if expected[name].grad is not None:  # lm_head has none
                assert error(whole(found.grad), expected[name].grad) < GRADIENT, name
        if ranks.is_first:
            (folder / "exported").mkdir()
        export(model, folder / "exported" if ranks.is_first else None, checkpoint)


def test_what_a_first_dimension_would_pad_is_split_by_another(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "six", num_experts=6, **TWO_LAYERS)
    run_ranks(4, compare_split_by_another_dimension, tmp_path)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("six", "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)


@pytest.mark.parametrize(
    ("shape", "ranks", "dim"),
    [
        ([256, 1024, 1536], 512, 1),  # experts
        ([512, 1024, 1536], 512, 0),
        ([151936, 1536], 512, 0),  # padded by 128 rows of 152,064
        ([1, 1536], 8, 1),  # a shared expert's gate
        ([6, 9], 4, 0),  # nothing divides
        ([5], 4, 0),
    ],
)
def test_dimension_of_a_split(shape: list[int], ranks: int, dim: int) -> None:
    assert sharded_dim(shape, ranks) == dim


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`qwen3_next`, `qwen3_moe` and `glm4_moe` students, a `teacher` and `tokens`; read-only."""
    folder = tmp_path_factory.mktemp("expert_parallel")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "qwen3_next", tokenizer=tokenizer, **TWO_LAYERS)
    write_tiny_checkpoint(folder / "qwen3_moe", tokenizer=tokenizer, native=QWEN3_MOE, num_hidden_layers=2)
    write_tiny_checkpoint(folder / "glm4_moe", tokenizer=tokenizer, native=GLM4_MOE, num_hidden_layers=2)
    starve(folder / "glm4_moe")
    write_tiny_checkpoint(folder / "teacher", seed=1, tokenizer=tokenizer, hidden_size=40, num_experts=4, **TWO_LAYERS)
    return folder


def train(folder: Path, student: str, out: Path, changes: dict[str, Any], end_before: int | None = None) -> None:
    """`distil`; with `end_before`, ends like a killed process when that step begins."""
    original, rank_log.EVERY_STEPS = Trainer.step, 1

    def step_or_end(self: Trainer, number: int) -> dict[str, float]:
        if number == end_before:
            os._exit(9)
        return original(self, number)

    Trainer.step = step_or_end  # type: ignore[method-assign]
    settings = {
        "tokens": STEPS * BATCH_SIZE * SEQUENCE_LENGTH,
        "batch_size": BATCH_SIZE,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "warmup": "2 steps",
        "save_every": "1 steps",
        "loss_chunk_tokens": 24,
        "load_balancing_coefficient": 0.5,  # large, so that experts counted per rank would be seen
        "optimizer": {"max_grad_norm": 0.3},  # always clipped
    }
    try:
        distil(
            TrainingInputs(folder / student, folder / "tokens", teacher=folder / "teacher"),
            out,
            **sections(DistilRecipe, settings | changes),
            text=TextSettings(sequence_length=SEQUENCE_LENGTH),
        )
    finally:
        Trainer.step = original  # type: ignore[method-assign]


def assert_equal_but_for_rounding(out: Path, expected: Path) -> None:
    logs = [(folder.parent / "metrics.jsonl").read_text().splitlines() for folder in (out, expected)]
    assert len(logs[0]) == len(logs[1]) == STEPS
    for line, expected_line in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert expected_line["grad_norm"] > 0.3
        for name in ("loss", "lm", "kd", "load_balancing", "grad_norm"):
            assert line[name] == pytest.approx(expected_line[name], rel=TRAINED if line["step"] else GRADIENT), name
    assert_trained_alike(*(load_file(folder / "model.safetensors") for folder in (out, expected)))


@pytest.mark.parametrize(
    ("student", "ranks", "changes"),
    [
        ("glm4_moe", 2, {"expert_ranks": 2, "micro_batch_size": 2, "recompute_activations": True}),
        pytest.param(
            *("qwen3_next", 4, {"expert_ranks": 2, "shard_ranks": 2, "micro_batch_size": 1, "reshard_student": False}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_shared_experts_train_as_one(
    folder: Path, tmp_path: Path, student: str, ranks: int, changes: dict[str, Any]
) -> None:
    train(folder, student, tmp_path / "alone" / "out", {})
    run_ranks(ranks, train, folder, student, tmp_path / "ranks" / "out", changes)
    assert_equal_but_for_rounding(tmp_path / "ranks" / "out", tmp_path / "alone" / "out")
    logs = [(tmp_path / "ranks" / "ranks" / f"rank-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    pairs = [sum(json.loads(line)["expert_pairs"] for line in step) for step in zip(*logs, strict=True)]
    assert len(pairs) == STEPS and pairs[0] > 0 and set(pairs) == {pairs[0]}  # of a step; the ranks differ


def pairs_of_the_third_step(file: Path, first_step: int, heldout_pairs: int) -> Any:
    """`most_expert_pairs` of a training of one MoE block from `first_step` on, with 100, 101 and 102 pairs in its three steps."""
    block = SimpleNamespace(received_pairs=0)
    ranks = SimpleNamespace(size=2, rank=0, experts_mesh="two ranks", largest=lambda value: value)
    student = SimpleNamespace(model=SimpleNamespace(modules=lambda: [block]))
    trainer = SimpleNamespace(ranks=ranks, student=student, device=torch.device("cpu"))
    log = rank_log.RankLog(cast(Trainer, trainer), MetricsLog(file, "slimqwen", 1))
    found: dict[str, float] = {}
    for step in range(first_step, 3):
        log.begin()
        block.received_pairs += 100 + step
        found = log.log(step, 0.5)
        block.received_pairs += heldout_pairs
    return found["most_expert_pairs"]


def test_the_pairs_of_a_line_are_those_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the steps before it, which a resumed training has not made, nor of held-out text between them."""
    monkeypatch.setattr(rank_log, "EVERY_STEPS", 3)
    for first_step in (0, 1, 2):
        for heldout_pairs in (0, 7):
            assert pairs_of_the_third_step(tmp_path / "metrics.jsonl", first_step, heldout_pairs) == 102
    lines = [json.loads(line) for line in (tmp_path / "ranks" / "rank-0.jsonl").read_text().splitlines()]
    assert [(line["step"], line["seconds"], line["expert_pairs"]) for line in lines] == [(2, 0.5, 102)] * 6


def test_resumed_on_other_expert_ranks(folder: Path, tmp_path: Path) -> None:
    """Two steps by two pairs, each of which shares the experts, one by one rank, one by a pair.

    A rank of the first four has half of the six experts, and three experts FSDP cuts by another dimension.
    """
    train(folder, "qwen3_moe", tmp_path / "alone" / "out", {})
    out = tmp_path / "changing" / "out"
    for ranks, expert_ranks, end in ((4, 2, 2), (1, None, 3)):
        changes = {"expert_ranks": expert_ranks, "micro_batch_size": 1}
        codes, said = Ranks(ranks, train, folder, "qwen3_moe", out, changes, end).end()
        assert 9 in codes, said
        assert max(state.name for state in (out.parent / ".out.state").glob("step-*")) == f"step-{end:09d}"
    run_ranks(2, train, folder, "qwen3_moe", out, {"expert_ranks": 2})
    assert_equal_but_for_rounding(out, tmp_path / "alone" / "out")


def test_what_does_not_divide(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with (
        pytest.raises(UserError, match="expert_ranks 3 does not divide the 8 ranks that share a copy"),
        join_ranks(torch.device("cpu"), expert_ranks=3),
    ):
        pass
    with (
        pytest.raises(UserError, match="expert_ranks 4 does not divide the 2 ranks that share a copy"),
        join_ranks(torch.device("cpu"), shard_ranks=2, expert_ranks=4),
    ):
        pass
    with pytest.raises(UserError, match=r"expert_ranks 8 does not divide the 4 experts of .*teacher: choose a divisor"):
        check_expert_ranks(Checkpoint(folder / "teacher"), 8)
