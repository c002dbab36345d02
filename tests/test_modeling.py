"""The model: Transformers' backbone, our MTP module, and what surrounds them, against Transformers' own words."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import FORWARD, error
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import fused, tiny_config, tiny_tensors, tiny_tokens, transformers_mtp_hidden, write_tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.families.family import Layout
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.model.device import ALIGNMENT_BYTES, ALLOCATOR_VARIABLES, resolve_device, resolve_dtype
from slimqwen.model.model import MtpCausalLM, initialise, load, save
from slimqwen.model.routing import observe_routing

pytestmark = pytest.mark.rounding

TOKENS = tiny_tokens(rows=3, columns=18)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("modeling") / "checkpoint")


@pytest.fixture(scope="module")
def model(folder: Path) -> MtpCausalLM:
    return load(folder)


@torch.no_grad()
def mtp_logits(model: MtpCausalLM, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    hidden = model(tokens, mask).mtp
    assert hidden is not None
    return hidden @ model.head.T


@torch.no_grad()
def main_logits(model: MtpCausalLM, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(tokens, mask).main @ model.head.T


# --- forward ----------------------------------------------------------------------------------------------------------


def test_the_backbone_is_transformers_own(folder: Path, model: MtpCausalLM) -> None:
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = own(TOKENS[:, :-1], use_cache=False).logits
    assert (
        expected.std() > 0.5
    )  # the tiny weights are large enough for the comparisons in these tests to mean something
    assert error(main_logits(model, TOKENS), expected) < FORWARD


def test_the_mtp_module_is_transformers_own(folder: Path, model: MtpCausalLM) -> None:
    tensors = load_file(folder / "model.safetensors")
    expected = transformers_mtp_hidden(model.backbone, tensors, TOKENS)
    with torch.no_grad():
        found = model(TOKENS).mtp
    assert expected.std() > 0.5
    assert error(found, expected) < FORWARD


def test_both_layouts_are_the_same_model(tmp_path: Path, model: MtpCausalLM) -> None:
    stacked = load(write_tiny_checkpoint(tmp_path / "fused", layout="fused"))
    held = model.tensors()
    assert stacked.tensors().keys() == held.keys()
    assert all(torch.equal(tensor, held[name]) for name, tensor in stacked.tensors().items())


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_weights_begin_where_pytorchs_own_memory_does(tmp_path: Path, layout: Layout) -> None:
    """On some processors a product's last bits depend on it; in the file weights begin anywhere."""
    folder = write_tiny_checkpoint(tmp_path / layout, layout=layout)
    checkpoint = Checkpoint(folder)
    assert any(checkpoint.read(name).data_ptr() % ALIGNMENT_BYTES for name in checkpoint.specs)
    assert not any(tensor.data_ptr() % ALIGNMENT_BYTES for tensor in load(folder).held().values())


def test_mtp_can_be_left_out(model: MtpCausalLM) -> None:
    with torch.no_grad():
        hidden = model(TOKENS, with_mtp=False)
        assert hidden.mtp is None and torch.equal(hidden.main, model(TOKENS).main)


def test_no_prediction_sees_its_target(model: MtpCausalLM) -> None:
    """h_i depends on t_0 .. t_i and predicts t_{i+1}; m_i on t_0 .. t_{i+1} and predicts t_{i+2}."""
    main, mtp = main_logits(model, TOKENS), mtp_logits(model, TOKENS)
    for changed in range(1, TOKENS.shape[1]):
        tokens = TOKENS.clone()
        tokens[:, changed] = (tokens[:, changed] + 1) % 300
        main_moved = (main_logits(model, tokens) - main).abs().amax(dim=(0, 2))
        mtp_moved = (mtp_logits(model, tokens) - mtp).abs().amax(dim=(0, 2))
        # t_changed is the target of h_{changed-1} and of m_{changed-2}: neither may move, and what follows must.
        assert main_moved[:changed].max() < FORWARD * main.abs().max()
        assert changed < 2 or mtp_moved[: changed - 1].max() < FORWARD * mtp.abs().max()
        assert mtp_moved[changed - 1] > 0.1
        assert changed == len(main_moved) or main_moved[changed] > 0.1


def test_drafting_on_reads_the_modules_own_output(model: MtpCausalLM) -> None:
    """Depth 2: the module applied to its own output and to Emb(t_{i+2}), which must depend on both."""
    decoder = model.backbone.get_decoder()
    with torch.no_grad():
        first = model(TOKENS).mtp
        assert first is not None and model.mtp is not None
        deeper = decoder.embed_tokens(TOKENS[:, 2:])
        second = model.mtp(first[:, :-1], deeper, decoder.rotary_emb)
        assert second.shape == (3, 16, 32)
        assert (model.mtp(first[:, :-1] * 0.5 + 1.0, deeper, decoder.rotary_emb) - second).abs().max() > 0.1


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(model: MtpCausalLM, side: str) -> None:
    rows, columns, padding = *TOKENS.shape, 5
    padded = torch.full((rows, columns + padding), 7)
    real = slice(0, columns) if side == "right" else slice(padding, None)
    mask = torch.zeros_like(padded, dtype=torch.bool)
    padded[:, real], mask[:, real] = TOKENS, True
    kept = slice(0, columns - 1) if side == "right" else slice(padding, None)
    main, mtp = main_logits(model, padded, mask)[:, kept], mtp_logits(model, padded, mask)[:, kept]
    assert error(main, main_logits(model, TOKENS)) < FORWARD and error(mtp, mtp_logits(model, TOKENS)) < FORWARD
    if side == "left":
        assert (mtp_logits(model, padded)[:, kept] - mtp_logits(model, TOKENS)).abs().max() > 0.1


# --- tensors, saving, initialising ------------------------------------------------------------------------------------


def test_the_model_holds_the_checkpoints_tensors(model: MtpCausalLM) -> None:
    expected = fused(tiny_tensors(tiny_config()), tiny_config())
    held = model.tensors()
    assert held.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(held[name], tensor)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_is_what_was_loaded_byte_for_byte(tmp_path: Path, layout: Any, dtype: torch.dtype, tied: bool) -> None:
    """Also in bfloat16 with a float32 A_log: training holds float32, and each tensor goes back to its own dtype."""
    source = write_tiny_checkpoint(
        tmp_path / "source", layout=layout, dtype=dtype, tie_word_embeddings=tied, num_hidden_layers=5
    )
    out = tmp_path / "out"
    out.mkdir()
    checkpoint = Checkpoint(source)
    save(load(source), out, checkpoint, checkpoint.config)
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_bfloat16_is_computed_in_bfloat16_and_is_near(folder: Path, model: MtpCausalLM) -> None:
    half = load(folder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.tensors().values()} == {torch.bfloat16}
    with torch.no_grad():
        hidden = half(TOKENS)
    assert hidden.main.dtype == torch.bfloat16 and hidden.mtp is not None and hidden.mtp.dtype == torch.bfloat16
    assert (hidden.main.float() - model(TOKENS).main).abs().mean() < 0.1


def test_initialise_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = initialise(tiny_config(), seed=5).tensors()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = initialise(tiny_config(), seed=5).tensors()
    assert torch.equal(torch.get_rng_state(), state)
    other = initialise(tiny_config(), seed=6).tensors()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["mtp.fc.weight"], other["mtp.fc.weight"])
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_initialise_draws_mtp_as_transformers_draws_the_backbone() -> None:
    model = initialise(tiny_config(hidden_size=64, initializer_range=0.05), seed=0)
    tensors = {name: tensor.detach() for name, tensor in model.tensors().items()}
    for name in ("fc.weight", "layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"):
        assert tensors[f"mtp.{name}"].std().item() == pytest.approx(0.05, rel=0.1)
    for name in ("layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate.weight"):
        assert tensors[f"mtp.{name}"].std().item() == pytest.approx(0.05, rel=0.15)
    for name in ("norm.weight", "pre_fc_norm_hidden.weight", "layers.0.input_layernorm.weight"):
        assert not tensors[f"mtp.{name}"].any()
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("mtp", [0, 1])
def test_a_new_model_is_saved_in_the_familys_layout(tmp_path: Path, mtp: int) -> None:
    config = tiny_config(num_nextn_predict_layers=mtp)
    model = initialise(config, seed=0)
    assert (model.mtp is None) == (mtp == 0)
    save(model, tmp_path, None, config, dtype=torch.bfloat16)
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.layouts.values()) == {"per_expert"} and checkpoint.has_mtp == bool(mtp)
    assert checkpoint.config["dtype"] == "bfloat16"
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    loaded = load(tmp_path).tensors()
    assert all(torch.equal(t.to(torch.bfloat16).float(), loaded[n]) for n, t in model.tensors().items())


# --- routing ----------------------------------------------------------------------------------------------------------


def test_routing_is_observed_in_every_block(model: MtpCausalLM) -> None:
    config = tiny_config()
    blocks = QWEN3_NEXT.moe_blocks(config)
    assert [block.name for block in blocks] == [f"model.layers.{i}" for i in range(4)] + ["mtp.layers.0"]
    assert [block.name for block in blocks if not block.is_mtp] == [b.name for b in blocks[:4]]
    with observe_routing(model, blocks) as seen, torch.no_grad():
        model(TOKENS)
        assert seen.keys() == {block.name for block in blocks}
        own = model.backbone(TOKENS[:, :-1], output_router_logits=True, use_cache=False)
    for layer, logits in enumerate(own.router_logits):
        assert error(seen[f"model.layers.{layer}"].logits, logits) < FORWARD
    for routing in seen.values():
        top = routing.logits.softmax(-1).topk(2)
        assert routing.experts.shape == routing.gates.shape == (3 * 17, 2)
        assert torch.equal(routing.experts, top.indices)
        torch.testing.assert_close(routing.gates, top.values / top.values.sum(-1, keepdim=True))
    before = dict(seen)
    with torch.no_grad():
        model(TOKENS)
    assert all(seen[name] is before[name] for name in seen)  # closed: nothing is watched any more


def test_modules_are_found_by_their_tensors_names(model: MtpCausalLM) -> None:
    assert model.module_of("model.norm.weight") is model.backbone.model.norm
    assert model.mtp is not None and model.module_of("mtp.fc.weight") is model.mtp.fc


# --- devices ----------------------------------------------------------------------------------------------------------


def test_devices_and_dtypes() -> None:
    cpu = resolve_device("cpu")
    assert cpu.type == "cpu" and resolve_device("auto").type in ("cpu", "cuda")
    assert resolve_dtype("auto", cpu) == torch.float32 and resolve_dtype("bfloat16", cpu) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    for wrong in ("nonsense", "cuda:99"):
        with pytest.raises(UserError, match=f"device '{wrong}'"):
            resolve_device(wrong)


@pytest.mark.parametrize(
    ("environment", "initialised", "expected"),
    [
        ({}, False, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, False, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, False, None),
        ({}, True, None),  # it would be read no more
    ],
)
def test_memory_of_a_gpu_grows_in_segments_unless_the_environment_sets_it(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], initialised: bool, expected: str | None
) -> None:
    """Set before the first tensor on a GPU is made, which is when PyTorch reads it."""
    seen: list[str | None] = []

    def ones(*_: object, **__: object) -> torch.Tensor:
        seen.append(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
        return torch.zeros(2)

    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch, "ones", ones)
    resolve_device("cuda")
    resolve_device("cpu")
    after = os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    assert seen == [expected, expected] and after == expected
