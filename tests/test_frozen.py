"""Parts that are not trained: the same step as with them in float32, in the bytes of the checkpoint, and the same bits in the result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from rounding import FORWARD, GRADIENT, TRAINED, assert_trained_alike, error
from safetensors.torch import load_file
from settings import sections
from test_expert_parallel import loss_of
from test_optimizer import killed_and_resumed, same_weights
from test_optimizer import train as train_some_steps
from tiny import tiny_tokens, write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.data.packed import PackedTokens
from slimqwen.data.stream import TokenStream
from slimqwen.model.kernels import BATCHED_EXPERTS
from slimqwen.model.model import MtpCausalLM, allocate, load, weightless
from slimqwen.parallel.job import join_job
from slimqwen.parallel.ranks import join_ranks, shard
from slimqwen.parallel.sharded_checkpoint import fill_own, whole
from slimqwen.recipe import DistilRecipe, TextSettings, TrainedPart, TrainedParts
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.optimizer import check_trained, parts_of, untrained
from slimqwen.training.trainer import Span, Student, Trainer

pytestmark = pytest.mark.rounding

SEQUENCE_LENGTH = 16
BATCH_SIZE = 4
STEPS = 3
TWO_LAYERS = {"num_hidden_layers": 2, "full_attention_interval": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student`, in bfloat16, and `tokens`; read-only."""
    folder = tmp_path_factory.mktemp("frozen")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "student", dtype=torch.bfloat16, tokenizer=tokenizer, **TWO_LAYERS)
    return folder


def recipe(**changes: Any) -> dict[str, Any]:
    """Return the arguments `recipe` and `execution`."""
    usual = {
        "tokens": STEPS * BATCH_SIZE * SEQUENCE_LENGTH,
        "batch_size": BATCH_SIZE,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "warmup": "0 steps",
        "terms": ["lm", "mtp_lm"],
    }
    return sections(DistilRecipe, usual | changes)


def trainer(folder: Path, held_as_stored: bool, **changes: Any) -> Trainer:
    settings, checkpoint = recipe(**changes), Checkpoint(folder / "student")
    frozen = untrained(checkpoint, settings["recipe"]) if held_as_stored else ()
    model = load(checkpoint.folder, torch.float32, "cpu", frozen)
    stream = TokenStream(PackedTokens(folder / "tokens" / "train"), SEQUENCE_LENGTH, seed=0)
    student = Student(model.train(), checkpoint.family, checkpoint.config)
    return Trainer(student, None, stream, span=Span(0, STEPS, STEPS), **settings)


def train(folder: Path, out: Path, changes: dict[str, Any], span: Span | None = None) -> Path:
    inputs = TrainingInputs(folder / "student", folder / "tokens")
    return distil(inputs, out, **recipe(**changes), text=TextSettings(sequence_length=SEQUENCE_LENGTH), span=span)


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


# --- the same step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES_NATIVE)
def test_the_gradients_are_those_beside_the_same_weights_in_float32(name: str, tmp_path: Path) -> None:
    """Everything is frozen but the norms, whose gradients have come through all of it."""
    native = FAMILIES_NATIVE[name]
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / name, native=native, dtype=torch.bfloat16))
    parts = parts_of(checkpoint.family, checkpoint.config)
    plain = load(checkpoint.folder)
    frozen = {own for own in plain.tensors() if parts[own] != "norm"}
    for own in frozen:
        plain.tensors()[own].requires_grad_(False)
    held = load(checkpoint.folder, torch.float32, "cpu", frozen)
    losses = []
    for model in (plain, held):
        model.set_experts_implementation(BATCHED_EXPERTS)
        loss = loss_of(model, tiny_tokens(2), torch.tensor([1.0, 0.5])) + (model.head.sin() * 0.1).sum()
        loss.backward()
        losses.append(loss.detach())
    assert error(losses[1], losses[0]) < FORWARD
    for own, tensor in plain.tensors().items():
        found = held.tensors()[own]
        assert torch.equal(found.float(), tensor)
        assert (found.grad is None) == (tensor.grad is None) == (own in frozen), own
        if tensor.grad is not None:
            assert error(found.grad, tensor.grad) < GRADIENT, own
    in_bfloat16 = {parts[own] for own, tensor in held.tensors().items() if tensor.dtype == torch.bfloat16}
    assert {"routed_experts", "attention", "embedding"} <= in_bfloat16


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("parts", ["no_experts", "router_only", ["router", "norm"]])
def test_training_is_that_beside_the_same_weights_in_float32(folder: Path, parts: Any, recompute: bool) -> None:
    changes = {"train": parts, "recompute_activations": recompute, "load_balancing_coefficient": 0.5}
    plain, held = (trainer(folder, as_stored, **changes) for as_stored in (False, True))
    for step in range(STEPS):
        assert held.step(step) == pytest.approx(plain.step(step), rel=TRAINED)
    assert_trained_alike(held.parameters, plain.parameters)


# --- what is held -------------------------------------------------------------------------------------------------------


def nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def test_a_frozen_parameter_takes_two_bytes_and_a_trained_one_sixteen(folder: Path) -> None:
    one = trainer(folder, held_as_stored=True, train="no_experts")
    one.step(0)
    tensors = one.student.model.tensors()
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    others = sum(tensor.numel() for name, tensor in tensors.items() if name not in experts)
    assert nbytes(experts.values()) == 2 * sum(tensor.numel() for tensor in experts.values())
    assert nbytes(one.parameters.values()) == 4 * others
    assert nbytes(tensor.grad for tensor in tensors.values() if tensor.grad is not None) == 4 * others
    moments = [value for state in one.optimizer.state.values() for name, value in state.items() if name != "step"]
    assert nbytes(moments) == 8 * others


def saved_bytes(model: MtpCausalLM) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside the parameters themselves."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.held().values()}
    saved: dict[int, torch.UntypedStorage] = {}  # all of them kept, so that no other gets an address again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert model(tiny_tokens(4)).main.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


def test_no_activation_is_kept_for_the_gradient_of_a_frozen_weight(folder: Path) -> None:
    """Of each (token, chosen expert) pair the inputs of its two products; nor is a copy of the weight in another dtype kept."""
    kept = {}
    for name, parts, as_stored in (
        ("trained", "all", False),
        ("float32", "no_experts", False),
        ("bfloat16", "no_experts", True),
    ):
        one = trainer(folder, as_stored, train=parts)
        kept[name] = saved_bytes(one.student.model)
    config = Checkpoint(folder / "student").config
    pairs = len(one.blocks) * (tiny_tokens(4).numel() - 4) * config["num_experts_per_tok"]
    assert kept["trained"] - kept["float32"] >= 4 * pairs * (config["hidden_size"] + config["moe_intermediate_size"])
    assert kept["bfloat16"] <= kept["float32"]


# --- as on GPUs ---------------------------------------------------------------------------------------------------------


def forward_backward(model: MtpCausalLM, tokens: Tensor) -> Tensor:
    model.set_experts_implementation(BATCHED_EXPERTS)
    loss = loss_of(model, tokens, torch.tensor([1.0, 0.5]))
    loss.backward()
    return loss.detach()


def test_under_autocast_it_is_the_same_to_the_bit(folder: Path) -> None:
    """As one GPU computes: products in bfloat16, the residual stream in float32."""
    plain, held = (trainer(folder, as_stored, train=["norm", "router"]) for as_stored in (False, True))
    losses = []
    for one in (plain, held):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(forward_backward(one.student.model, tiny_tokens(2)))
    assert torch.equal(*losses)
    for name, parameter in plain.parameters.items():
        assert torch.equal(held.parameters[name].grad, parameter.grad), name


def compare_gathered_in_bfloat16(folder: Path) -> None:
    """As several GPUs compute: all that is trained is gathered in bfloat16."""
    checkpoint, device = Checkpoint(folder / "student"), torch.device("cpu")
    names = untrained(checkpoint, recipe(train=["norm", "router"])["recipe"])
    results = []
    with join_ranks(device) as ranks:
        for as_stored in (False, True):
            model = weightless(checkpoint, torch.float32, device)
            if as_stored:
                model.freeze(names, checkpoint, torch.bfloat16)
            shard(model, ranks, mixed_precision=True, reshard_after_forward=True)
            allocate(model, device)
            fill_own(model.held(), checkpoint)
            for name, tensor in model.tensors().items():
                tensor.requires_grad_(name not in names)
            loss = forward_backward(model, tiny_tokens(2, seed=ranks.rank))
            gradients = {
                name: whole(tensor.grad) for name, tensor in model.tensors().items() if tensor.grad is not None
            }
            results.append((loss, gradients))
    (expected, gradients), (loss, found) = results
    assert torch.equal(loss, expected) and found.keys() == gradients.keys() and found
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient), name


# --- the result ---------------------------------------------------------------------------------------------------------


def train_on_ranks(folder: Path, out: Path, changes: dict[str, Any]) -> None:
    """Sharded; sharded with experts shared out; and one step as GPUs compute it."""
    with join_job(torch.device("cpu")):
        train(folder, out / "sharded", changes)
        train(folder, out / "shared", changes | {"expert_ranks": 2})
        compare_gathered_in_bfloat16(folder)


def test_what_is_not_trained_keeps_its_bits_on_two_ranks_too(folder: Path, tmp_path: Path) -> None:
    """With an average of the weights and micro-batches."""
    changes = {"train": "no_experts", "ema_decay": 0.25, "micro_batch_size": 1, "optimizer": {"weight_decay": 0.0}}
    before, alone = weights(folder / "student"), weights(train(folder, tmp_path / "alone", changes))
    run_ranks(2, train_on_ranks, folder, tmp_path, changes)
    for name in ("alone", "sharded", "shared"):
        found = weights(tmp_path / name)
        experts = {name for name in before if ".experts." in name}
        assert all(torch.equal(found[name], before[name]) for name in experts)
        changed = {name for name in before if not torch.equal(found[name], before[name])}
        assert changed and not changed & experts
        for name in before:  # rounded to bfloat16, two trainings differ by a step of it here and there
            assert error(found[name].float(), alone[name].float()) < 2**-7, name


def test_resumed_is_uninterrupted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"train": "no_experts", "ema_decay": 0.25}
    expected = train_some_steps(folder, tmp_path / "expected" / "out", changes)
    assert same_weights(killed_and_resumed(folder, tmp_path / "out", changes, monkeypatch), expected)


def test_a_training_begins_again_with_what_is_on_disk(folder: Path) -> None:
    """The choice of a learning rate loads the first weights again after each fork."""
    one = trainer(folder, held_as_stored=True, train="no_experts")
    before = {name: tensor.detach().clone() for name, tensor in one.student.model.held().items()}
    one.step(0)
    fill_own(one.student.model.held(), Checkpoint(folder / "student"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.student.model.held().items())


# --- the recipe ---------------------------------------------------------------------------------------------------------


def test_presets_are_sets_of_the_families_parts() -> None:
    every = set(TrainedPart.__args__)  # type: ignore[attr-defined]
    assert TrainedParts.ALL.parts == every
    assert TrainedParts.NO_EXPERTS.parts == every - {"routed_experts"}
    assert {str(word) for word in TrainedParts} == every | {"all", "no_experts", "router_only"}
    frozen = recipe(train="all", optimizer={"learning_rate_scale": {"router": 0.0, "norm": 0.5}})["recipe"]
    assert frozen.trained_parts == every - {"router"}


def test_what_cannot_be_trained_is_refused(folder: Path) -> None:
    student = Checkpoint(folder / "student")
    with pytest.raises(UserError, match=r"distil.train names 'dense_mlp', .* parts are attention, deltanet"):
        check_trained(recipe(train=["router", "dense_mlp"])["recipe"], student)
    with pytest.raises(UserError, match=r"distil.train \[mtp_projection\] leaves nothing to train"):
        check_trained(recipe(train="mtp_projection", terms=["lm"])["recipe"], student)
