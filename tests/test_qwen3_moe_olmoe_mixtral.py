"""What the families without linear attention and MTP say in their own words; test_every_family.py proves their tables."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import canonical, write_tiny_checkpoint
from tiny_families import MIXTRAL, OLMOE, QWEN3_MOE

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.families import FAMILIES, Config
from slimqwen.families.count import count
from slimqwen.pruning.cut import Cut
from slimqwen.recipe import Target
from slimqwen.shapes.target import completed, target_config

pytestmark = pytest.mark.rounding

QWEN3_30B: Config = {  # as released: no num_local_experts, no rope_parameters
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_235B = QWEN3_30B | {
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}
OLMOE_7B: Config = {
    "model_type": "olmoe",
    "clip_qkv": None,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
}
MIXTRAL_8X7B: Config = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    ("released", "total", "active"),
    [  # billions; their names and model cards say the same with fewer digits
        pytest.param(QWEN3_30B, 30.532, 3.353, id="Qwen3-30B-A3B"),
        pytest.param(QWEN3_235B, 235.094, 22.191, id="Qwen3-235B-A22B"),
        pytest.param(OLMOE_7B, 6.919, 1.282, id="OLMoE-1B-7B"),
        pytest.param(MIXTRAL_8X7B, 46.703, 12.880, id="Mixtral-8x7B"),
    ],
)
def test_the_released_models_in_numbers(released: Config, total: float, active: float) -> None:
    family = FAMILIES[released["model_type"]]
    counts = count(family, family.normalise(released))
    assert (round(counts.total_parameters / 1e9, 3), round(counts.active_parameters / 1e9, 3)) == (total, active)
    assert counts.mtp_parameters == 0


def written(config: Config) -> Config:
    return FAMILIES[config["model_type"]].to_disk(config)


@pytest.mark.parametrize("word", ["num_experts", "num_local_experts"])
def test_qwen3_moe_is_read_in_either_word_and_written_in_both(word: str) -> None:
    native = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"} | {word: 6}
    config = canonical(native)
    assert config["num_experts"] == 6 and "num_local_experts" not in config
    assert written(config)["num_experts"] == written(config)["num_local_experts"] == 6


@pytest.mark.parametrize("native", [QWEN3_MOE, OLMOE, MIXTRAL], ids=lambda native: native["model_type"])
def test_canonical_words_are_canonical_only(native: Config) -> None:
    config = canonical(native)
    assert config["layer_types"] == ["full_attention"] * 3 and config["num_nextn_predict_layers"] == 0
    assert (config["num_experts"], config["moe_intermediate_size"]) == (6, 16)
    only = {"layer_types", "mlp_layer_types", "num_nextn_predict_layers"}
    assert not only & written(config).keys()
    for key, value in native.items():
        assert written(config)[key] == (8 if value is None and key == "head_dim" else value), key
    assert written(config)["rope_theta"] == 10000.0


def test_dense_layers_follow_a_depth_cut(tmp_path: Path) -> None:
    source = Checkpoint(write_tiny_checkpoint(tmp_path / "source", native=QWEN3_MOE, mlp_only_layers=[0, 2]))
    assert source.config["mlp_layer_types"] == ["dense", "sparse", "dense"]
    (tmp_path / "out").mkdir()
    Cut(source, [1, 2], {}, {}).write(tmp_path / "out", "test")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mlp_only_layers"], config["decoder_sparse_step"], config["num_hidden_layers"]) == ([1], 1, 2)
    assert "model.layers.1.mlp.gate_proj.weight" in Checkpoint(tmp_path / "out").specs

    every_second = canonical(QWEN3_MOE | {"mlp_only_layers": [], "decoder_sparse_step": 2})
    assert every_second["mlp_layer_types"] == ["dense", "sparse", "dense"]


@pytest.mark.parametrize("native", [QWEN3_MOE, MIXTRAL], ids=lambda native: native["model_type"])
def test_heads_keep_their_size_when_the_hidden_size_is_cut(native: Config) -> None:
    native = {key: value for key, value in native.items() if key != "head_dim"}
    config, family = canonical(native), FAMILIES[native["model_type"]]
    target = completed(family, Target(hidden_size=24), config)
    assert written(target_config(family, config, target))["head_dim"] == 8


@pytest.mark.parametrize("native", [OLMOE, MIXTRAL], ids=lambda native: native["model_type"])
def test_null_kv_heads_are_as_many_as_query_heads(native: Config) -> None:
    assert written(canonical(native | {"num_key_value_heads": None}))["num_key_value_heads"] == 4


def test_olmoes_heads_are_cut_along_with_its_hidden_size() -> None:
    """Transformers gives q_norm hidden_size entries, so that the heads must span it."""
    family, config = FAMILIES["olmoe"], FAMILIES["olmoe"].normalise(OLMOE_7B)

    def cut_to(**sizes: Any) -> Config:
        return target_config(family, config, completed(family, Target(**sizes), config))

    with pytest.raises(UserError, match=r"16 heads of 128 do not span 1536: ask for num_attention_heads 12, and"):
        cut_to(hidden_size=1536)
    with pytest.raises(
        UserError, match=r"16 heads of 128 do not span 1500: choose a hidden_size that is a multiple of 128"
    ):
        cut_to(hidden_size=1500)
    new = family.to_disk(cut_to(hidden_size=1536, num_key_value_heads=12))
    assert (new["hidden_size"], new["num_attention_heads"], new["num_key_value_heads"]) == (1536, 12, 12)
    assert "head_dim" not in new


WRONG: dict[str, tuple[Config, Config, str]] = {
    "two numbers of experts": (QWEN3_MOE, {"num_local_experts": 8}, "num_experts and num_local_experts .* must agree"),
    "biases": (QWEN3_MOE, {"attention_bias": True}, "attention_bias True is not supported: no released qwen3_moe"),
    "biases of OLMoE": (OLMOE, {"attention_bias": True}, "attention_bias True is not supported: no released olmoe"),
    "MTP": (
        MIXTRAL,
        {"num_nextn_predict_layers": 1},
        "num_nextn_predict_layers 1 is not supported: no released mixtral",
    ),
    "linear layers": (
        QWEN3_MOE,
        {"layer_types": ["linear_attention"] * 3},
        "layer_types has .*linear_attention.*; known are full_attention",
    ),
    "top-k": (MIXTRAL, {"num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than num_experts 6"),
    "experts": (MIXTRAL, {"num_local_experts": None}, "'num_local_experts' must be a positive whole number, is None"),
    "expert size": (OLMOE, {"intermediate_size": "16"}, "'intermediate_size' must be .*, is '16'"),
    "heads": (OLMOE, {"num_attention_heads": 0}, "'num_attention_heads' must be a positive whole number, is 0"),
    "head size": (OLMOE, {"num_attention_heads": 64, "num_key_value_heads": 64}, "'head_dim' must be .*, is 0"),
    "KV heads": (MIXTRAL, {"num_key_value_heads": 3}, "'num_attention_heads' = 4 is not a multiple of 3"),
    "heads of OLMoE": (OLMOE, {"head_dim": 12}, "4 heads of 12 do not span 32: choose a hidden_size"),
    "layers": (OLMOE, {"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is more than 10000 layers"),
}


@pytest.mark.parametrize(("native", "change", "message"), WRONG.values(), ids=WRONG)
def test_a_config_that_cannot_be_true_is_told_in_a_sentence(native: Config, change: Config, message: str) -> None:
    family = FAMILIES[native["model_type"]]
    with pytest.raises(UserError, match=message):
        family.sizes(family.normalise(native | change))
