"""What only Qwen3.5-MoE and GLM-4 MoE have: a vision tower that is carried along, MTP as one more decoder layer, a router
of sigmoids with a correction bias. What every family must do is in test_every_family.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import FORWARD, error
from safetensors.torch import load_file, save_file
from tiny import (
    canonical,
    fused,
    put_json,
    tiny_tensors,
    tiny_tokens,
    transformers_mtp_hidden,
    transformers_mtp_step,
    write_tiny_checkpoint,
)
from tiny_families import GLM4_MOE as GLM_NATIVE
from tiny_families import QWEN3_5_MOE as WRAPPER_NATIVE
from tiny_families import QWEN3_5_MOE_TEXT as TEXT_NATIVE
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5MoeForConditionalGeneration
from transformers.modeling_layers import MtpModel

from slimqwen.calibration.observe import observe
from slimqwen.calibration.statistics import Part, Statistics
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.families import FAMILIES, Config
from slimqwen.families.count import count
from slimqwen.families.glm4_moe import GLM4_MOE
from slimqwen.families.qwen3_5_moe import LANGUAGE_MODEL, QWEN3_5_MOE, QWEN3_5_MOE_TEXT
from slimqwen.model.model import load, save
from slimqwen.model.routing import observe_routing
from slimqwen.planning.experts import ExpertGroup
from slimqwen.pruning.cut import Cut

pytestmark = pytest.mark.rounding

TOKENS = tiny_tokens(rows=2, columns=19)
ROUTER_BIAS = "mlp.gate.e_score_correction_bias"


def alone(expert: int) -> ExpertGroup:
    return ExpertGroup(base=expert, members=[expert], weights=[1.0])


def cut(source: Path, out: Path, layers: list[int], hidden: list[int], experts: list[int]) -> Path:
    """These layers, residual channels and experts of a checkpoint, nothing merged."""
    checkpoint = Checkpoint(source)
    groups = {
        block.name: [alone(expert) for expert in experts] for block in checkpoint.family.moe_blocks(checkpoint.config)
    }
    out.mkdir()
    Cut(checkpoint, layers, {"hidden": hidden}, groups).write(out, "test")
    return out


# --- MTP --------------------------------------------------------------------------------------------------------------


def test_mtp_gives_a_rotary_table_of_three_axes_three_positions(tmp_path: Path) -> None:
    """That of Transformers 5.17 takes nothing else; later ones repeat positions [1, seq] themselves."""
    model = load(write_tiny_checkpoint(tmp_path / "checkpoint", native=TEXT_NATIVE))
    decoder = model.backbone.get_decoder()

    class OfThreeAxes(nn.Module):
        mrope_section = decoder.rotary_emb.mrope_section

        def forward(self, x: Tensor, position_ids: Tensor) -> Any:
            assert position_ids.shape == (3, 1, TOKENS.shape[1] - 1)
            return decoder.rotary_emb(x, position_ids)

    with torch.no_grad():
        hidden = model(TOKENS)
        found = model.mtp(hidden.main, decoder.embed_tokens(TOKENS[:, 1:]), OfThreeAxes())
    assert torch.equal(found, hidden.mtp)


@pytest.mark.parametrize("native", [TEXT_NATIVE, WRAPPER_NATIVE, GLM_NATIVE], ids=lambda native: native["model_type"])
def test_the_mtp_module_is_transformers_own(tmp_path: Path, native: Config) -> None:
    """Its MtpModel on the checkpoint's tensors: order of the concatenation, norms, rotary positions, routing."""
    model = load(write_tiny_checkpoint(tmp_path / "checkpoint", native=native))
    tensors = fused(load_file(tmp_path / "checkpoint" / "model.safetensors"), model.config)
    named = {model.family.module_name(name, model.config): tensor for name, tensor in tensors.items()}
    expected = transformers_mtp_hidden(model.backbone, named, TOKENS)
    assert expected.std() > 0.5
    with torch.no_grad():
        assert error(model(TOKENS).mtp, expected) < FORWARD


@pytest.mark.parametrize("native", [TEXT_NATIVE, GLM_NATIVE], ids=lambda native: native["model_type"])
def test_mtp_total_equals_transformers_mtp_model(native: Config) -> None:
    config = canonical(native)
    family = FAMILIES[config["model_type"]]
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family.to_disk(config)))
        mtp = MtpModel(backbone, 1)
    assert count(family, config).mtp_parameters == sum(tensor.numel() for tensor in mtp.layers.state_dict().values())


@pytest.mark.parametrize("native", [TEXT_NATIVE, WRAPPER_NATIVE, GLM_NATIVE], ids=lambda native: native["model_type"])
def test_a_checkpoint_that_lost_its_mtp_module_is_one_without(tmp_path: Path, native: Config) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", native=native)
    checkpoint = Checkpoint(source)
    tensors = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not checkpoint.specs[name].block.is_mtp}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, source / "model.safetensors")
    without = Checkpoint(source)
    assert checkpoint.has_mtp and not without.has_mtp
    assert load(source).mtp is None
    assert not any(spec.block.is_mtp for spec in without.specs.values())


# --- Qwen3.5: the release's config and layouts ------------------------------------------------------------------------

TEXT_35B: Config = {  # Qwen3.5-35B-A3B's text_config, in part
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 248320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "mtp_num_hidden_layers": 1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}


def test_qwen3_5_35b_in_numbers() -> None:
    config = QWEN3_5_MOE_TEXT.normalise(TEXT_35B)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TEXT_35B))
    counts = count(QWEN3_5_MOE_TEXT, config)
    assert counts.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert round(counts.total_parameters / 1e9, 1) == 34.7
    assert round(counts.active_parameters / 1e9, 1) == 3.5


def test_the_number_of_mtp_modules_is_written_for_vllm_and_for_transformers() -> None:
    config = QWEN3_5_MOE_TEXT.normalise(TEXT_35B)
    assert config["num_nextn_predict_layers"] == 1
    written = QWEN3_5_MOE_TEXT.to_disk(config)
    assert written["mtp_num_hidden_layers"] == written["num_mtp_layers"] == 1
    assert written["mtp_layer_types"] == ["full_attention"] and written["full_attention_interval"] == 4
    assert AutoConfig.for_model(**written).get_mtp_config().layer_types == ["full_attention"]

    without = QWEN3_5_MOE_TEXT.to_disk(config | {"num_nextn_predict_layers": 0})
    assert without["mtp_num_hidden_layers"] == 0 and not {"num_mtp_layers", "mtp_layer_types"} & without.keys()
    assert QWEN3_5_MOE_TEXT.normalise(without)["num_nextn_predict_layers"] == 0


def test_a_trunk_may_be_fused_and_its_mtp_module_per_expert(tmp_path: Path) -> None:
    """As in the release; both stay as they are in a cut."""
    source = write_tiny_checkpoint(tmp_path / "source", native=TEXT_NATIVE)
    one_each = load_file(source / "model.safetensors")
    stacked = fused(one_each, TEXT_NATIVE)
    mixed = {name: tensor for name, tensor in stacked.items() if not name.startswith("mtp.")}
    save_file(mixed | {n: t for n, t in one_each.items() if n.startswith("mtp.")}, source / "model.safetensors")

    layouts = {f"model.layers.{layer}": "fused" for layer in range(4)} | {"mtp.layers.0": "per_expert"}
    assert Checkpoint(source).layouts == layouts
    everything = cut(source, tmp_path / "out", [0, 1, 2, 3], list(range(32)), list(range(8)))
    assert Checkpoint(everything).layouts == layouts
    before, after = (load_file(folder / "model.safetensors") for folder in (source, everything))
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert load(everything).mtp is not None


# --- Qwen3.5: the vision-language model -------------------------------------------------------------------------------


def image() -> dict[str, Tensor]:
    """A prompt with an image of 4 x 6 patches, which is 2 x 3 tokens."""
    ids = WRAPPER_NATIVE["image_token_id"]
    tokens = tiny_tokens(rows=1, columns=12) % ids
    tokens[0, 2:10] = torch.tensor([ids + 2, *[ids] * 6, ids + 3])
    pixels = torch.randn(24, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": tokens,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "mm_token_type_ids": (tokens == ids).int(),
    }


def whole(folder: Path) -> Qwen3_5MoeForConditionalGeneration:
    """The vision-language model as Transformers loads it, with nothing missing and nothing left over."""
    model, told = Qwen3_5MoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_the_wrapper_is_what_transformers_saves(tmp_path: Path, layout: str) -> None:
    config = canonical(WRAPPER_NATIVE)
    model = Qwen3_5MoeForConditionalGeneration(AutoConfig.for_model(**QWEN3_5_MOE.to_disk(config)))
    model.save_pretrained(tmp_path, save_original_format=layout == "per_expert")
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    layouts: Any = dict.fromkeys(QWEN3_5_MOE.detect_layouts(config, set()), layout)
    specs = [spec for spec in QWEN3_5_MOE.tensors(config, layouts) if not spec.block.is_mtp]
    assert {spec.name: spec.shape for spec in specs} == saved

    counts = count(QWEN3_5_MOE, config)
    assert counts.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert counts.parts["vision"] == sum(parameter.numel() for parameter in model.model.visual.parameters())
    text = count(QWEN3_5_MOE_TEXT, canonical(TEXT_NATIVE))
    assert counts.active_parameters == text.active_parameters and counts.mtp_parameters == text.mtp_parameters
    assert counts.total_parameters == text.total_parameters + counts.parts["vision"]


def test_a_cut_of_the_wrapper_is_the_cut_of_its_text_model_and_sees_as_before(tmp_path: Path) -> None:
    wrapper = write_tiny_checkpoint(tmp_path / "wrapper", native=WRAPPER_NATIVE, layout="fused")
    text = write_tiny_checkpoint(tmp_path / "text", native=TEXT_NATIVE, layout="fused")
    before = load_file(wrapper / "model.safetensors")
    alone = {
        name.replace(LANGUAGE_MODEL, "model."): tensor for name, tensor in before.items() if ".visual." not in name
    }
    save_file(alone, text / "model.safetensors", metadata={"format": "pt"})

    hidden, layers, experts = sorted({*range(32)} - {3, 4, 17, 30}), [0, 2, 3], [7, 1, 4, 2, 5]
    pruned = cut(wrapper, tmp_path / "pruned_wrapper", layers, hidden, experts)
    pruned_text = cut(text, tmp_path / "pruned_text", layers, hidden, experts)
    after = load_file(pruned / "model.safetensors")

    # The language model is the text family's result, and computes the same.
    for name, tensor in load_file(pruned_text / "model.safetensors").items():
        ours = name.replace("model.", LANGUAGE_MODEL, 1) if name.startswith("model.") else name
        assert torch.equal(after.pop(ours), tensor), name
    with torch.no_grad():
        ours, theirs = load(pruned)(TOKENS), load(pruned_text)(TOKENS)
    assert torch.equal(ours.main, theirs.main) and ours.mtp is not None and torch.equal(ours.mtp, theirs.mtp)

    # What is left is the vision tower: the same bytes, but for the rows that go into the residual stream.
    assert after.keys() == {name for name in before if name.startswith("model.visual.")}
    projection = {f"model.visual.merger.linear_fc2.{kind}" for kind in ("weight", "bias")}
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name][hidden] if name in projection else before[name]), name
    config = json.loads((pruned / "config.json").read_text())
    assert config["vision_config"]["out_hidden_size"] == config["text_config"]["hidden_size"] == 28
    assert config["vision_config"]["hidden_size"] == 24 and config["image_token_id"] == WRAPPER_NATIVE["image_token_id"]

    # Transformers runs it on an image; the image tokens' embeddings are the kept channels of what they were.
    model, original = whole(pruned), whole(wrapper)
    with torch.no_grad():
        assert model(**image(), use_cache=False).logits.isfinite().all()
        text_logits = model(input_ids=TOKENS[:, :-1], use_cache=False).logits
        assert error(text_logits, ours.main @ load(pruned).head.T) < FORWARD
        pictures = {key: image()[key] for key in ("pixel_values", "image_grid_thw")}
        seen, seen_before = (m.get_image_features(**pictures).pooler_output[0] for m in (model, original))
    assert seen.shape == (6, 28) and seen.std() > 0.1
    assert error(seen, seen_before[:, hidden]) < FORWARD


def test_the_wrapper_is_saved_with_the_vision_tower_of_its_checkpoint(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", native=WRAPPER_NATIVE, layout="fused", dtype=torch.bfloat16)
    out = tmp_path / "out"
    out.mkdir()
    checkpoint = Checkpoint(source)
    model = load(source)
    save(model, out, checkpoint, checkpoint.config)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="start from a checkpoint that has it"):
        save(model, tmp_path / "new", None, checkpoint.config)


def test_what_surrounds_the_text_config_is_kept() -> None:
    native = WRAPPER_NATIVE | {
        "text_config": WRAPPER_NATIVE["text_config"] | {"tie_word_embeddings": True},
        "extra": [1],
    }
    config = QWEN3_5_MOE.normalise(native)
    assert config["model_type"] == "qwen3_5_moe" and config["hidden_size"] == 32
    assert config["tie_word_embeddings"] is False  # the whole's word counts, and is written at both levels
    written = QWEN3_5_MOE.to_disk(config | {"hidden_size": 24})
    assert written["extra"] == [1] and written["architectures"] == ["Qwen3_5MoeForConditionalGeneration"]
    assert written["text_config"]["model_type"] == "qwen3_5_moe_text"
    assert "vision_config" not in written["text_config"] and "architectures" not in written["text_config"]
    assert written["text_config"]["tie_word_embeddings"] is False
    assert written["text_config"]["hidden_size"] == written["vision_config"]["out_hidden_size"] == 24
    assert native["vision_config"]["out_hidden_size"] == 32  # nothing that was read is changed


VISION = WRAPPER_NATIVE["vision_config"]
WRONG_WRAPPERS: dict[str, tuple[Config, str]] = {
    "no text": ({"text_config": None}, "'text_config' must be a mapping"),
    "no vision": ({"vision_config": []}, "a text model without a vision tower is a qwen3_5_moe_text"),
    "vision size": (
        {"vision_config": VISION | {"patch_size": [4, 4]}},
        r"'vision_config.patch_size' must be a positive",
    ),
    "vision depth": ({"vision_config": VISION | {"depth": 10**6}}, "vision_config.depth 1000000 is more than"),
    "widths": (
        {"vision_config": VISION | {"out_hidden_size": 40}},
        "out_hidden_size 40 is not text_config.hidden_size 32",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_WRAPPERS.values(), ids=WRONG_WRAPPERS)
def test_a_wrapper_that_cannot_be_true_is_told_in_a_sentence(change: Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        QWEN3_5_MOE.normalise(WRAPPER_NATIVE | change)


# --- GLM: config ------------------------------------------------------------------------------------------------------

GLM_4_5_AIR: Config = {  # as released: rope in the old form
    "model_type": "glm4_moe",
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
GLM_4_6 = GLM_4_5_AIR | {
    "first_k_dense_replace": 3,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_hidden_layers": 92,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}


@pytest.mark.parametrize(("native", "billions", "active"), [(GLM_4_5_AIR, 106.9, 12.8), (GLM_4_6, 352.8, 32.9)])
def test_the_released_glms_in_numbers(native: Config, billions: float, active: float) -> None:
    config = GLM4_MOE.normalise(native)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**native))
    counts = count(GLM4_MOE, config)
    assert counts.total_parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    assert round(counts.total_parameters / 1e9, 1) == billions
    assert round(counts.active_without_input_embedding / 1e9, 1) == active


def test_glm_speaks_canonically_and_is_written_in_its_own_words() -> None:
    config = GLM4_MOE.normalise(GLM_4_6)
    assert config["num_experts"] == 160 and config["shared_expert_intermediate_size"] == 1536
    assert config["mlp_layer_types"] == ["dense"] * 3 + ["sparse"] * 89
    written = GLM4_MOE.to_disk(config)
    assert {key: written[key] for key in GLM_4_6} == GLM_4_6
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 0.5}
    assert written.keys() - GLM_4_6.keys() == {"rope_parameters"}
    read = AutoConfig.for_model(**written)
    assert read.rope_parameters["rope_theta"] == 1000000 and read.num_mtp_layers == 1


def test_cuts_of_glm_change_its_own_words() -> None:
    config = GLM4_MOE.normalise(GLM_NATIVE | {"num_hidden_layers": 5, "first_k_dense_replace": 2})
    sizes = GLM4_MOE.sizes(config)
    axes = {axis.name: axis for axis in sizes}
    smaller = sizes | {axes["expert"]: 4, axes["expert_neuron"]: 8, axes["shared_neuron"]: 24}
    written = GLM4_MOE.to_disk(GLM4_MOE.resized(config, smaller, [0, 3, 4], 2))
    assert (written["n_routed_experts"], written["moe_intermediate_size"], written["n_shared_experts"]) == (4, 8, 3)
    assert (written["num_hidden_layers"], written["first_k_dense_replace"]) == (3, 1)
    with pytest.raises(UserError, match="shared_expert_intermediate_size 24 is none: choose 32"):
        GLM4_MOE.resized(config, smaller | {axes["expert_neuron"]: 16}, [0, 3, 4], 2)
    with pytest.raises(UserError, match=r"dense layers .* come before all others"):
        GLM4_MOE.resized(config, sizes, [3, 0], 2)


WRONG_GLMS: dict[str, tuple[Config, str]] = {
    "groups": ({"n_group": 2, "topk_group": 1}, "n_group 2 is not supported"),
    "two MTP modules": ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
    "dense layers": ({"first_k_dense_replace": 9}, "'first_k_dense_replace' must be a number of layers up to 3, is 9"),
    "no shared experts": ({"n_shared_experts": 0}, "'n_shared_experts' must be a positive whole number"),
    "top-k": ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than num_experts 6"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_GLMS.values(), ids=WRONG_GLMS)
def test_a_glm_that_cannot_be_true_is_told_in_a_sentence(change: Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GLM4_MOE.normalise(GLM_NATIVE | change)


# --- GLM: the router --------------------------------------------------------------------------------------------------


def test_glms_router_is_observed_as_it_routes(tmp_path: Path) -> None:
    """Chosen by sigmoid + bias, weighed by sigmoid alone; the dense layer has no router."""
    model = load(write_tiny_checkpoint(tmp_path / "checkpoint", native=GLM_NATIVE))
    blocks = model.family.moe_blocks(model.config)
    assert [block.name for block in blocks] == ["model.layers.1", "model.layers.2", "model.layers.3"]
    assert [block.is_mtp for block in blocks] == [False, False, True]
    held = model.held()
    biased = False
    with observe_routing(model, blocks) as seen, torch.no_grad():
        model(TOKENS)
    for block in blocks:
        routing = seen[block.name]
        scores = routing.logits.sigmoid()
        bias = held[model.family.module_name(block.prefix + ROUTER_BIAS, model.config)]
        chosen = (scores + bias).topk(2).indices.sort().values
        assert torch.equal(routing.experts.sort().values, chosen)
        biased |= not torch.equal(scores.topk(2).indices.sort().values, chosen)
        picked = scores.gather(1, routing.experts)
        torch.testing.assert_close(routing.gates, 2.5 * picked / picked.sum(-1, keepdim=True))
    assert biased  # somewhere the bias decided


def test_observed_experts_of_glm_compute_the_same(tmp_path: Path) -> None:
    """The gates sum to the scaling factor in the forward pass, and to 1 in the statistics."""
    model = load(write_tiny_checkpoint(tmp_path / "checkpoint", native=GLM_NATIVE))
    part = Part("text", 0)
    statistics = Statistics("checkpoint", "data", {part: {"main": 36, "mtp": 36}})
    with torch.inference_mode():
        plain = model(TOKENS)
        with observe(model, statistics), statistics.part(part):
            observed = model(TOKENS)
    assert error(observed.main, plain.main) < FORWARD and error(observed.mtp, plain.mtp) < FORWARD
    for block in ("model.layers.1", "model.layers.3"):
        assert statistics.sums[f"text/0/experts/{block}/assignments"].sum() == 2 * 36
        assert statistics.sums[f"text/0/experts/{block}/gate_sums"].sum().item() == pytest.approx(36)


def bfloat16_glm(folder: Path, **overrides: Any) -> dict[str, Tensor]:
    """A bfloat16 checkpoint whose correction biases are float32, as released, with all the numbers that float32 has."""
    config = canonical(GLM_NATIVE | {"dtype": "bfloat16"} | overrides)
    exact = tiny_tensors(config)
    tensors = {name: t if name.endswith(ROUTER_BIAS) else t.to(torch.bfloat16) for name, t in exact.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    put_json(folder / "config.json", GLM4_MOE.to_disk(config))
    return tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_correction_bias_stays_float32_in_a_bfloat16_model(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = bfloat16_glm(tmp_path / "source")
    model = load(tmp_path / "source", dtype=dtype)
    held = model.held()
    for name, tensor in tensors.items():
        if name.endswith(ROUTER_BIAS):
            assert torch.equal(held[GLM4_MOE.module_name(name, model.config)], tensor)
            assert not torch.equal(tensor, tensor.to(torch.bfloat16).float())
    assert {tensor.dtype for tensor in model.tensors().values()} == {dtype}
    assert not any(name.endswith(ROUTER_BIAS) for name in model.tensors())  # nothing to train

    checkpoint = Checkpoint(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    save(model, out, checkpoint, checkpoint.config)
    saved = load_file(out / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(saved[name].dtype == t.dtype and torch.equal(saved[name], t) for name, t in tensors.items())
    pruned = load_file(
        cut(tmp_path / "source", tmp_path / "pruned", [0, 1, 2], list(range(32)), [4, 0, 3]) / "model.safetensors"
    )
    for name, tensor in tensors.items():
        if name.endswith(ROUTER_BIAS):
            assert pruned[name].dtype == torch.float32 and torch.equal(pruned[name], tensor[[4, 0, 3]])


# --- GLM: MTP as one more layer ---------------------------------------------------------------------------------------


def test_a_depth_cut_renumbers_the_mtp_layer(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", native=GLM_NATIVE)
    out = cut(source, tmp_path / "out", [0, 2], list(range(32)), list(range(6)))
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert {int(name.split(".")[2]) for name in after if name.startswith("model.layers.")} == {0, 1, 2}
    numbers = {0: 0, 1: 2, 2: 3}
    for name, tensor in after.items():
        start, layers, *rest = name.split(".")
        old = ".".join([start, layers, str(numbers[int(rest[0])]), *rest[1:]]) if layers == "layers" else name
        assert torch.equal(tensor, before[old]), name
    assert {"model.layers.2.eh_proj.weight", "model.layers.2.shared_head.norm.weight"} < after.keys()


COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


def with_copies(folder: Path, copies: list[str]) -> Path:
    """A checkpoint whose MTP layer repeats these of the backbone's embeddings (GLM-4.5 both, GLM-4.6 neither)."""
    write_tiny_checkpoint(folder, native=GLM_NATIVE)
    tensors = load_file(folder / "model.safetensors")
    repeated = {f"model.layers.3.{name}": tensors[COPIES[name]].clone() for name in copies}
    save_file(tensors | repeated, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "copies",
    [[], ["embed_tokens.weight"], ["shared_head.head.weight"], list(COPIES)],
)
def test_copies_of_the_embeddings_follow_where_there_are_any(tmp_path: Path, copies: list[str]) -> None:
    source = with_copies(tmp_path / "source", copies)
    hidden = [0, 5, *range(8, 30)]
    out = cut(source, tmp_path / "out", [0, 2], hidden, [0, 1, 2])
    model = load(out)
    with torch.no_grad():  # as training would
        model.backbone.model.embed_tokens.weight += 1.0
        model.backbone.lm_head.weight -= 1.0
    trained, checkpoint = tmp_path / "trained", Checkpoint(out)
    trained.mkdir()
    save(model, trained, checkpoint, checkpoint.config)
    for folder in (out, trained):
        tensors = load_file(folder / "model.safetensors")
        found = {name: tensors[f"model.layers.2.{name}"] for name in COPIES if f"model.layers.2.{name}" in tensors}
        assert list(found) == copies
        for name, tensor in found.items():
            assert tensor.shape == (300, 24) and torch.equal(tensor, tensors[COPIES[name]])
        assert "mtp_copies" not in json.loads((folder / "config.json").read_text())
    assert Checkpoint(trained).config == checkpoint.config
    embeddings = len(copies) * 300 * 24
    plain = GLM4_MOE.normalise(GLM4_MOE.to_disk(checkpoint.config))
    assert count(GLM4_MOE, checkpoint.config).mtp_parameters == count(GLM4_MOE, plain).mtp_parameters + embeddings


def test_transformers_own_mtp_loader_reads_a_cut_to_46_layers(tmp_path: Path) -> None:
    """It knows GLM's MTP layer by the numbers 46 and 92 only; a cut to another depth says so."""
    native = GLM_NATIVE | {"num_hidden_layers": 46}
    source = write_tiny_checkpoint(tmp_path / "source", native=native)
    backbone, told = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not any(told.values())
    theirs, model = MtpModel.from_pretrained(backbone), load(source)
    inputs = TOKENS[:, :-1]
    with torch.no_grad():
        hidden = backbone.model(input_ids=inputs, use_cache=False).last_hidden_state
        expected = transformers_mtp_step(theirs, hidden, TOKENS[:, 1:])
        assert error(model(TOKENS).mtp, expected) < FORWARD
    assert GLM4_MOE.serving_note(model.config) is None
    note = GLM4_MOE.serving_note(model.config | {"num_hidden_layers": 30})
    assert note is not None and "layer 30" in note
    assert GLM4_MOE.serving_note(model.config | {"num_hidden_layers": 30, "num_nextn_predict_layers": 0}) is None
