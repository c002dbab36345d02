"""Which parameters train, how fast and by which optimiser; each kind's state, saved and read again, goes on to the bit."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ranks import run_ranks
from rounding import assert_trained_alike
from safetensors.torch import load_file
from settings import sections
from tiny import write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.model.model import load
from slimqwen.recipe import DistilRecipe, OptimizerRecipe, TextSettings
from slimqwen.training.average import Average
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs, check_batch
from slimqwen.training.optimizer import (
    MUON_PARTS,
    build_optimizer,
    check_optimizer,
    freeze_untrained,
    parts_of,
    set_learning_rate,
)
from slimqwen.training.trainer import Span, Trainer

SEQUENCE_LENGTH = 16
BATCH_SIZE = 4
STEPS = 4
TWO_LAYERS = {"num_hidden_layers": 2, "full_attention_interval": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student` and `tokens`; read-only."""
    folder = tmp_path_factory.mktemp("optimizer")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "student", tokenizer=tokenizer, **TWO_LAYERS)
    return folder


def recipe(**changes: Any) -> dict[str, Any]:
    """Return the arguments `recipe` and `execution`."""
    usual = {
        "tokens": STEPS * BATCH_SIZE * SEQUENCE_LENGTH,
        "batch_size": BATCH_SIZE,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "warmup": "2 steps",
        "save_every": "2 steps",
        "terms": ["lm", "mtp_lm"],
    }
    return sections(DistilRecipe, usual | changes)


def train(folder: Path, out: Path, changes: dict[str, Any], span: Span | None = None) -> Path:
    """`distil` without a teacher, by one process or, called in each, by several."""
    return distil(
        TrainingInputs(folder / "student", folder / "tokens"),
        out,
        **recipe(**changes),
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
        span=span,
    )


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


class Killed(Exception):
    """Stands for kill -9."""


def killed_and_resumed(folder: Path, out: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Killed when step 3 begins, and continued from the state after step 2."""
    original = Trainer.step

    def step_or_die(self: Trainer, step: int) -> dict[str, float]:
        if step == 3:
            raise Killed
        return original(self, step)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "step", step_or_die)
        train(folder, out, changes)
    assert [path.name for path in (out.parent / f".{out.name}.state").glob("step-*")] == ["step-000000002"]
    return train(folder, out, changes)


# --- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES_NATIVE)
def test_every_parameter_of_every_family_is_of_a_part(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / name, native=FAMILIES_NATIVE[name]))
    parts = parts_of(checkpoint.family, checkpoint.config)
    parameters = load(checkpoint.folder).tensors()
    assert parameters.keys() <= parts.keys()
    found = {parts[name] for name in parameters}
    assert {"embedding", "norm", "attention", "router", "routed_experts"} <= found
    assert all("experts" in name for name in parameters if parts[name] == "routed_experts")


def test_groups_by_decay_and_learning_rate(folder: Path) -> None:
    model = load(folder / "student")
    parts = parts_of(model.family, model.config)
    whole = recipe(
        optimizer={
            "weight_decay": 0.5,
            "weight_decay_exempt": ["router", "embedding"],
            "learning_rate_scale": {"router": 0.1, "attention": 0.0},
        }
    )["recipe"]
    parameters = freeze_untrained(model, parts, whole.trained_parts, with_mtp=True)
    optimizer = build_optimizer(parameters, parts, whole.optimizer)
    set_learning_rate(optimizer, 2.0)
    found = {id(p): (group["weight_decay"], group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(parameters)
    for name, parameter in model.tensors().items():
        assert parameter.requires_grad == (name in parameters) == (parts[name] != "attention"), name
        if name in parameters:
            decays = parameter.dim() > 1 and parts[name] not in ("router", "embedding")
            assert found[id(parameter)] == (0.5 if decays else 0.0, 0.2 if parts[name] == "router" else 2.0), name
    vectors = [name for name in parameters if name.endswith(("A_log", "dt_bias"))]
    assert vectors and all(found[id(parameters[name])][0] == 0.0 for name in vectors)


def test_a_frozen_part_keeps_its_bits_and_has_no_state(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    changes = {"optimizer": {"learning_rate_scale": {"embedding": 0, "router": 0}}}
    before = weights(folder / "student")
    after = weights(killed_and_resumed(folder, tmp_path / "out", changes, monkeypatch))
    frozen = {name for name in before if name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"))}
    assert len(frozen) == 2 + 3  # two layers and MTP
    assert {name for name in before if torch.equal(before[name], after[name])} >= frozen
    assert any(not torch.equal(before[name], after[name]) for name in before.keys() - frozen)


def test_the_settings_in_use_do_not_matter_where_they_name_nothing(folder: Path, tmp_path: Path) -> None:
    plain = train(folder, tmp_path / "plain", {})
    scaled = train(folder, tmp_path / "scaled", {"optimizer": {"learning_rate_scale": {"router": 1.0}}})
    assert same_weights(plain, scaled)


def test_what_the_student_does_not_have(folder: Path, tmp_path: Path) -> None:
    student = Checkpoint(folder / "student")
    with pytest.raises(UserError, match=r"weight_decay_exempt names 'dense_mlp', .* parts are attention, deltanet"):
        check_optimizer(OptimizerRecipe(weight_decay_exempt=["dense_mlp"]), student)
    everything = dict.fromkeys(parts_of(student.family, student.config).values(), 0.0)
    with pytest.raises(UserError, match="0 for every part"):
        check_optimizer(OptimizerRecipe(learning_rate_scale=everything), student)
    with pytest.raises(UserError, match="names 'dense_mlp'"):
        train(folder, tmp_path / "out", {"optimizer": {"learning_rate_scale": {"dense_mlp": 0.5}}})
    assert list(tmp_path.iterdir()) == []


# --- Muon --------------------------------------------------------------------------------------------------------------


def test_muon_takes_the_hidden_matrices(folder: Path) -> None:
    """One step without gradient but a momentum: what moves by an orthogonal matrix, scaled to AdamW's size."""
    model = load(folder / "student")
    parts = parts_of(model.family, model.config)
    optimizer = build_optimizer(model.tensors(), parts, OptimizerRecipe(kind="muon", weight_decay=0.0))
    by_muon = {name for name, p in model.tensors().items() if "momentum_buffer" in optimizer.state[p]}
    expected = {n for n, p in model.tensors().items() if parts[n] in MUON_PARTS and p.dim() == 2}
    assert by_muon == expected and any("q_proj" in name for name in by_muon)
    assert all("exp_avg" in optimizer.state[p] for name, p in model.tensors().items() if name not in by_muon)

    name = next(name for name in by_muon if name.endswith("out_proj.weight"))
    parameter, before = model.tensors()[name], model.tensors()[name].detach().clone()
    parameter.grad = torch.randn_like(parameter)
    set_learning_rate(optimizer, 1e-3)
    optimizer.step()
    update = (before - parameter.detach()) / 1e-3
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.3)  # as large as AdamW's usually are
    assert torch.linalg.svdvals(update).min() > 0.5 * torch.linalg.svdvals(update).max()


def test_muon_resumed_is_uninterrupted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"optimizer": "muon"}
    expected = train(folder, tmp_path / "expected" / "out", changes)
    assert not same_weights(expected, train(folder, tmp_path / "adamw" / "out", {}))
    assert same_weights(killed_and_resumed(folder, tmp_path / "out", changes, monkeypatch), expected)


@pytest.mark.parametrize("optimizer", ["muon", "adamw_8bit"])
@pytest.mark.usefixtures("torchao")
def test_what_is_for_one_device(folder: Path, optimizer: str) -> None:
    student = Checkpoint(folder / "student")
    check_optimizer(OptimizerRecipe(kind=optimizer), student)
    with pytest.raises(UserError, match=f"{optimizer} is for one device, and there are 2 ranks"):
        check_optimizer(OptimizerRecipe(kind=optimizer), student, ranks=2)


# --- 8 bits ------------------------------------------------------------------------------------------------------------


class EightBit(Tensor):
    """As torchao's: a moment as codes and scales, to other code a float32 tensor."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "EightBit":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> "EightBit":
        return cls(**inner)

    def __torch_dispatch__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("nothing but the optimiser computes with it")

    def read(self) -> Tensor:
        return self.codes.float() * self.scale

    def write(self, values: Tensor) -> None:
        self.scale.copy_(values.abs().max().clamp(min=1e-12) / 127)
        self.codes.copy_((values / self.scale).round())


class FakeAdamW8bit(torch.optim.Optimizer):
    """Has what matters of torchao's AdamW8bit: a tensor as learning rate, and quantised moments."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            group["lr"] = torch.tensor(group["lr"])
            group["id"] = id(group["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert id(group["lr"]) == group["id"], "the learning rate was replaced"
            for p in group["params"]:
                state, beta = self.state[p], group["betas"][0]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = EightBit(torch.zeros(p.shape, dtype=torch.int8), torch.zeros(1))
                state["step"] += 1
                state["exp_avg"].write(state["exp_avg"].read().lerp(p.grad, 1 - beta))
                p.sub_(state["exp_avg"].read().sign() * group["lr"] / state["step"])


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module: Any = ModuleType("torchao.optim")
    module.AdamW8bit = FakeAdamW8bit
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", module)
    yield


@pytest.mark.usefixtures("torchao")
def test_8_bit_resumed_is_uninterrupted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"optimizer": "adamw_8bit"}
    expected = train(folder, tmp_path / "expected" / "out", changes)
    assert same_weights(killed_and_resumed(folder, tmp_path / "out", changes, monkeypatch), expected)


def test_8_bit_without_torchao(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"needs torchao .*pip install torchao"):
        train(folder, tmp_path / "out", {"optimizer": "adamw_8bit"})
    assert list(tmp_path.iterdir()) == []


# --- the average -------------------------------------------------------------------------------------------------------


def test_the_average_by_hand() -> None:
    """Weights 0, then 1, 2, 3: the decay is 1/10, 2/11, then at most 0.2."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    average = Average([weight], optimizer, decay=0.2)
    expected = 0.0
    for steps, decay in enumerate((1 / 10, 2 / 11, 0.2)):
        with torch.no_grad():
            weight += 1
        average.update(steps)
        expected = decay * expected + (1 - decay) * (steps + 1)
        assert optimizer.state[weight]["ema"].item() == pytest.approx(expected)
    average.copy_to_weights()
    assert weight.item() == pytest.approx(expected)


def test_the_average_is_what_a_training_writes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The average of the weights after each step, which trainings of 1 to 4 steps of the same run show."""
    ends = [weights(train(folder, tmp_path / f"{n}", {}, Span(0, n, STEPS))) for n in range(1, STEPS + 1)]
    expected = weights(folder / "student")
    for steps, end in enumerate(ends):
        decay = min(0.25, (1 + steps) / (10 + steps))
        expected = {name: decay * expected[name] + (1 - decay) * end[name] for name in expected}
    changes = {"ema_decay": 0.25}
    averaged = train(folder, tmp_path / "averaged" / "out", changes)
    for name, tensor in weights(averaged).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7, msg=name)
        assert not torch.equal(tensor, ends[-1][name]), name
    assert same_weights(killed_and_resumed(folder, tmp_path / "out", changes, monkeypatch), averaged)


# --- on two ranks ------------------------------------------------------------------------------------------------------


def test_two_ranks_are_one(folder: Path, tmp_path: Path) -> None:
    """A growing batch, an average, a frozen part and a slow one, all at once."""
    changes = {
        "batch_size_ramp": {"start": 2, "tokens": 3 * SEQUENCE_LENGTH},
        "micro_batch_size": 1,
        "ema_decay": 0.25,
        "optimizer": {"learning_rate_scale": {"embedding": 0.0, "router": 0.5}},
    }
    run_ranks(2, train, folder, tmp_path / "pair" / "out", changes)
    alone = weights(train(folder, tmp_path / "alone" / "out", changes))
    assert_trained_alike(weights(tmp_path / "pair" / "out"), alone)


def test_a_first_batch_that_ranks_cannot_share() -> None:
    settings = recipe(batch_size_ramp={"start": 1, "tokens": 99})["recipe"]
    with pytest.raises(UserError, match=r"batch_size_ramp.start 1 cannot be shared by 2 ranks"):
        check_batch(settings, 2)
