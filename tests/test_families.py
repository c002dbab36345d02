"""The table of Qwen3-Next against Transformers' own modules and against the released model's numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from slimqwen.core.errors import UserError
from slimqwen.families import Config, family_of
from slimqwen.families.count import count
from slimqwen.families.qwen3_next import QWEN3_NEXT

# Qwen3-Next-80B-A3B as released: rope and attention pattern in the old form, MTP not mentioned (formats.md 1).
RELEASED: Config = {
    "model_type": "qwen3_next",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "intermediate_size": 5120,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "max_position_embeddings": 262144,
}
SLIMQWEN = RELEASED | {"num_hidden_layers": 36, "hidden_size": 1536, "num_experts": 256, "num_experts_per_tok": 8}

ATTENTION_LAYER = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "self_attn.o_proj.weight",
    "mlp.gate.weight",
    "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert.down_proj.weight",
    "mlp.shared_expert_gate.weight",
]


def on_meta(config: Config) -> PreTrainedModel:
    """Transformers' model of a config, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shapes_on_disk(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(tiny_config(), id="tiny"),
        pytest.param(tiny_config(tie_word_embeddings=True), id="tied"),
        pytest.param(tiny_config(num_hidden_layers=7, linear_num_value_heads=2, num_key_value_heads=4), id="other"),
        pytest.param(RELEASED, id="80B"),
        pytest.param(SLIMQWEN, id="23B"),
    ],
)
def test_totals_equal_transformers(config: Config) -> None:
    assert count(QWEN3_NEXT, QWEN3_NEXT.normalise(config)).total_parameters == parameters(on_meta(config))


def test_mtp_total_equals_transformers_mtp_model() -> None:
    config = QWEN3_NEXT.normalise(RELEASED | {"num_hidden_layers": 4})
    backbone = on_meta(QWEN3_NEXT.to_disk(config))
    with torch.device("meta"):
        mtp = MtpModel(backbone, 1)
    assert count(QWEN3_NEXT, config).mtp_parameters == parameters(mtp.layers)


def test_the_released_model_in_numbers() -> None:
    counts = count(QWEN3_NEXT, QWEN3_NEXT.normalise(RELEASED))
    assert counts.total_parameters == 79_674_391_296
    assert counts.mtp_parameters == 1_650_471_424
    assert round(counts.active_parameters / 1e9, 3) == 3.875
    assert round(counts.active_without_input_embedding / 1e9, 3) == 3.564
    assert sum(counts.parts.values()) == counts.total_parameters
    assert counts.parts["routed_experts"] == 48 * 512 * 3 * 512 * 2048
    assert sum(1 for _ in QWEN3_NEXT.tensors(QWEN3_NEXT.normalise(RELEASED))) == 75_944


def test_the_papers_target_in_numbers() -> None:
    counts = count(QWEN3_NEXT, QWEN3_NEXT.normalise(SLIMQWEN))
    assert round(counts.total_parameters / 1e9, 2) == 23.18
    assert 2.0e9 < counts.active_parameters < 2.2e9


def test_active_leaves_out_the_experts_that_were_not_chosen() -> None:
    config = tiny_config()
    counts = count(QWEN3_NEXT, config)
    expert = 3 * 16 * 32
    assert counts.total_parameters - counts.active_parameters == 4 * (8 - 2) * expert
    assert counts.mtp_parameters - counts.mtp_active_parameters == (8 - 2) * expert
    assert counts.active_parameters - counts.active_without_input_embedding == 300 * 32
    without = count(QWEN3_NEXT, config | {"num_nextn_predict_layers": 0})
    assert (without.total_parameters, without.mtp_parameters) == (counts.total_parameters, 0)


# --- names and shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_transformers_writes(tmp_path: Path, layout: Any, tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.save_pretrained(tmp_path, save_original_format=layout == "per_expert")
    written = shapes_on_disk(tmp_path / "model.safetensors")

    layouts = dict.fromkeys(QWEN3_NEXT.detect_layouts(config, set()), layout)
    specs = list(QWEN3_NEXT.tensors(config, layouts))
    table = {spec.name: spec.shape for spec in specs if not spec.block.is_mtp}
    assert table == written
    assert len({spec.name for spec in specs}) == len(specs)
    assert QWEN3_NEXT.detect_layouts(config, {spec.name for spec in specs}) == layouts


def test_the_mtp_tensors_are_a_full_attention_layer_and_its_surroundings() -> None:
    specs = {spec.name: spec for spec in QWEN3_NEXT.tensors(tiny_config())}
    experts = [f"mlp.experts.{e}.{p}_proj.weight" for e in range(8) for p in ("gate", "up", "down")]
    layer = {f"mtp.layers.0.{name}" for name in ATTENTION_LAYER + experts}
    around = {"mtp.fc.weight", "mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"}
    assert {name for name in specs if name.startswith("mtp.")} == layer | around
    assert {name for name, spec in specs.items() if spec.block.is_mtp} == layer | around
    for name in ATTENTION_LAYER + experts:  # layer 3 of the backbone is one
        assert specs[f"mtp.layers.0.{name}"].shape == specs[f"model.layers.3.{name}"].shape
    assert specs["mtp.fc.weight"].shape == (32, 64)
    assert not any(spec.name.startswith("mtp.") for spec in QWEN3_NEXT.tensors(tiny_config(num_nextn_predict_layers=0)))


def test_layouts_may_mix_within_a_checkpoint() -> None:
    config = tiny_config()
    layouts = QWEN3_NEXT.detect_layouts(config, {"model.layers.1.mlp.experts.gate_up_proj"})
    assert layouts.pop("model.layers.1") == "fused"
    assert set(layouts.values()) == {"per_expert"} and len(layouts) == 4
    names = {spec.name for spec in QWEN3_NEXT.tensors(config, {**layouts, "model.layers.1": "fused"})}
    assert "model.layers.1.mlp.experts.down_proj" in names and "model.layers.0.mlp.experts.down_proj" not in names


# --- config.json ------------------------------------------------------------------------------------------------------


def test_a_config_survives_its_sizes() -> None:
    config = tiny_config()
    sizes = QWEN3_NEXT.sizes(config)
    assert {axis.name: size for axis, size in sizes.items()} == {
        "vocab": 300,
        "hidden": 32,
        "expert": 8,
        "expert_neuron": 16,
        "shared_neuron": 20,
        "dense_neuron": 40,
        "kv_head": 2,
        "query_head": 2,
        "head_dim": 8,
        "key_head": 2,
        "value_head": 2,
        "key_dim": 8,
        "value_dim": 12,
        "conv_kernel": 4,
    }
    assert QWEN3_NEXT.resized(config, sizes, [0, 1, 2, 3], 2) == config


def test_resizing_changes_the_fields_of_what_was_cut_and_no_others() -> None:
    config = tiny_config(num_hidden_layers=8)
    sizes = QWEN3_NEXT.sizes(config)
    axes = {axis.name: axis for axis in sizes}
    smaller = sizes | {axes["hidden"]: 24, axes["expert"]: 4, axes["kv_head"]: 1, axes["value_head"]: 1}
    new = QWEN3_NEXT.resized(config, smaller, [0, 1, 3, 6, 7], 1)
    changed = {key: value for key, value in new.items() if config.get(key) != value}
    linear, full = "linear_attention", "full_attention"
    assert changed == {
        "num_hidden_layers": 5,
        "hidden_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 1,
        "num_attention_heads": 2,
        "linear_num_value_heads": 2,
        "layer_types": [linear, linear, full, linear, full],
        "mlp_layer_types": ["sparse"] * 5,
    }
    assert set(config) == set(new)
    written = QWEN3_NEXT.to_disk(new)
    assert set(config) - set(written) == {"mlp_layer_types", "full_attention_interval"}  # not true of this stack


def test_the_old_form_says_the_same_as_the_new_one() -> None:
    old = QWEN3_NEXT.normalise(RELEASED)
    assert old["layer_types"] == (["linear_attention"] * 3 + ["full_attention"]) * 12
    assert old["num_nextn_predict_layers"] == 1 and "layer_types" not in RELEASED
    assert QWEN3_NEXT.attention_layers(old) == list(range(3, 48, 4))

    small = tiny_config()
    legacy = {k: v for k, v in small.items() if k not in ("rope_parameters", "layer_types", "num_nextn_predict_layers")}
    assert legacy["rope_theta"] == 10000.0 and legacy["full_attention_interval"] == 4
    new = QWEN3_NEXT.to_disk(QWEN3_NEXT.normalise(legacy))
    assert count(QWEN3_NEXT, QWEN3_NEXT.normalise(new)) == count(QWEN3_NEXT, small)
    loaded = AutoConfig.for_model(**new)
    assert loaded.layer_types == small["layer_types"]
    assert loaded.rope_parameters["rope_theta"] == 10000.0
    assert loaded.rope_parameters["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize("layers", [4, 8])
def test_both_old_and_new_keys_are_written(layers: int) -> None:
    config = tiny_config(num_hidden_layers=layers)
    assert config["rope_theta"] == 10000.0 and config["partial_rotary_factor"] == 0.5
    assert config["full_attention_interval"] == 4
    assert config["num_mtp_layers"] == 1 and config["mtp_layer_types"] == ["full_attention"]


WRONG: dict[str, tuple[Config, str]] = {
    "another family": ({"model_type": "qwen3_nxt"}, "qwen3_nxt.*did you mean 'qwen3_next'"),
    "top-k": ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than num_experts 8"),
    "query heads": ({"num_attention_heads": 5}, "'num_attention_heads' = 5 is not a multiple of 2"),
    "value heads": ({"linear_num_value_heads": 3}, "'linear_num_value_heads' = 3 is not a multiple of 2"),
    "zero": ({"hidden_size": 0}, "'hidden_size' must be a positive whole number, is 0"),
    "text": ({"head_dim": "8"}, "'head_dim' must be a positive whole number, is '8'"),
    "layer_types too short": ({"layer_types": ["full_attention"]}, "names 1 layers, num_hidden_layers is 4"),
    "layer kind": ({"layer_types": ["full_attention"] * 3 + ["mamba"]}, "mamba"),
    "dense layers": ({"mlp_only_layers": "first"}, "mlp_only_layers"),
    "sparse step": ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "two MTP modules": ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_config_that_cannot_be_true_is_told_in_a_sentence(change: Config, message: str) -> None:
    config = tiny_config() | change
    with pytest.raises(UserError, match=message):
        family = family_of(config, "config.json")
        family.sizes(family.normalise(config))


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_experts",
        "num_experts_per_tok",
        "head_dim",
        "linear_num_value_heads",
    ],
)
def test_a_missing_field_is_named(field: str) -> None:
    config = {key: value for key, value in tiny_config().items() if key != field}
    with pytest.raises(UserError, match=f"'{field}'"):
        QWEN3_NEXT.sizes(QWEN3_NEXT.normalise(config))


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_experts", "num_experts_per_tok"])
def test_a_field_that_is_no_number_is_named(field: str) -> None:
    with pytest.raises(UserError, match=f"'{field}'"):
        QWEN3_NEXT.sizes(QWEN3_NEXT.normalise(tiny_config() | {field: "many"}))
