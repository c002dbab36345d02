"""Counting and costs from config.json alone: against Transformers' models on the meta device, and by hand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import canonical, tiny_config
from tiny_families import FAMILIES_NATIVE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from slimqwen.checkpoint.config import read_config
from slimqwen.core.errors import UserError
from slimqwen.families import FAMILIES, Config
from slimqwen.families.count import count, tally
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.recipe import Target
from slimqwen.recipe.file import load_recipe
from slimqwen.shapes.counts import Comparison, compare, comparison_table
from slimqwen.shapes.footprint import dtype_of, footprint, forward_flops
from slimqwen.shapes.target import completed, target_config
from slimqwen.shapes.training_memory import TrainingSettings

RECIPES = Path(__file__).parent.parent / "recipes"
PAPER = {  # the models of the paper, as the recipes have them: config, target
    "80B-A3B": ("qwen3-next-80b-a3b.json", None),
    "23A2B": ("qwen3-next-80b-a3b.json", "slimqwen-23a2b.yaml"),
    "24A2B": ("qwen3-next-24b-a2b.json", None),
    "6A1B": ("qwen3-next-24b-a2b.json", "slimqwen-6a1b.yaml"),
}


def paper_config(name: str) -> Config:
    source, target = PAPER[name]
    family, config = read_config(RECIPES / source)
    wanted = Target() if target is None else load_recipe(RECIPES / target, model=Target)
    return target_config(family, config, completed(family, wanted, config))


def on_meta(config: Config) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN3_NEXT.to_disk(config)))


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_equal_transformers(name: str) -> None:
    config = paper_config(name)
    counts = count(QWEN3_NEXT, config)
    model = on_meta(config)
    assert counts.total_parameters == parameters(model)
    with torch.device("meta"):
        assert counts.mtp_parameters == parameters(MtpModel(model, 1).layers)


def test_the_papers_totals() -> None:
    totals = {name: count(QWEN3_NEXT, paper_config(name)).total_parameters for name in PAPER}
    assert totals == {
        "80B-A3B": 79_674_391_296,
        "23A2B": 23_176_328_256,
        "24A2B": 24_172_774_848,
        "6A1B": 5_866_292_800,
    }


def test_active_conventions() -> None:
    """What the plan's footnote says about the paper's 3.8B and 2.0B."""
    for name, embedded, without, without_either in (
        ("80B-A3B", 3.875, 3.564, 3.253),
        ("23A2B", 2.113, 1.879, 1.646),
    ):
        counts = count(QWEN3_NEXT, paper_config(name))
        head = counts.active_without_input_embedding - counts.parts["embedding"] // 2
        assert round(counts.active_parameters / 1e9, 3) == embedded
        assert round(counts.active_without_input_embedding / 1e9, 3) == without
        assert round(head / 1e9, 3) == without_either


def test_a_grid_of_shapes_is_counted_like_each_of_them() -> None:
    config = tiny_config()
    sizes = QWEN3_NEXT.sizes(config)
    hidden, experts, chosen = np.ix_([8, 16, 32], [2, 8], [1, 2])
    grid = tally(QWEN3_NEXT, config, {**sizes, QWEN3_NEXT.hidden: hidden, QWEN3_NEXT.expert: experts}, chosen)
    for i, j, k in np.ndindex(3, 2, 2):
        shape = {"hidden_size": [8, 16, 32][i], "num_experts": [2, 8][j], "num_experts_per_tok": [1, 2][k]}
        one = count(QWEN3_NEXT, config | shape)
        for field in ("total_parameters", "active_parameters", "active_without_input_embedding", "mtp_parameters"):
            assert np.broadcast_to(grid[field], (3, 2, 2))[i, j, k] == getattr(one, field), field


# --- footprint --------------------------------------------------------------------------------------------------------


def test_costs_of_the_80b_by_hand() -> None:
    config = paper_config("80B-A3B")
    costs = footprint(QWEN3_NEXT, config, config, context_length=32_768, settings=TrainingSettings())
    assert costs.dtype == "bfloat16"
    assert costs.checkpoint_bytes == 2 * (79_674_391_296 + 1_650_471_424)
    assert costs.kv_cache_bytes == 12 * 2 * 2 * 256 * 2 * 32_768  # layers, keys and values, KV heads, head_dim, bytes
    recurrent, convolution = 32 * 128 * 128 * 4, (2 * 16 * 128 + 32 * 128) * 4 * 2
    assert costs.state_bytes == 36 * (recurrent + convolution)


@pytest.mark.parametrize("model_type", FAMILIES_NATIVE)
def test_cache_bytes_equal_transformers_cache(model_type: str) -> None:
    """What the tables say is remembered is what Transformers keeps after a prefill, byte for byte and by dtype."""
    family = FAMILIES[model_type]
    # The tiny Mixtral has a window of 8 tokens, which no released one has and the tables do not know.
    config = canonical(FAMILIES_NATIVE[model_type] | {"dtype": "bfloat16", "sliding_window": None})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family.to_disk(config)), dtype=torch.bfloat16)
    with torch.no_grad():
        cache = model(torch.arange(11)[None], use_cache=True).past_key_values
    kept = {"kv": 0, "state": 0}
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            kept["state"] += layer.recurrent_states[0].nbytes + layer.conv_states[0].nbytes
        else:
            kept["kv"] += layer.keys.nbytes + layer.values.nbytes
    costs = footprint(family, config, config, context_length=11, settings=TrainingSettings())
    assert kept == {"kv": costs.kv_cache_bytes, "state": costs.state_bytes}
    assert costs.kv_cache_bytes > 0


def test_forward_flops_by_hand() -> None:
    config = tiny_config(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    config["mlp_layer_types"] = ["sparse", "sparse"]
    hidden, vocab, experts, chosen = 32, config["vocab_size"], config["num_experts"], config["num_experts_per_tok"]
    keys, values = 2 * 8, 4 * 12  # heads x head dim
    assert [config[f"linear_{name}"] for name in ("num_key_heads", "num_value_heads")] == [2, 4]
    assert [config[f"linear_{name}_head_dim"] for name in ("key", "value")] == [8, 12]
    deltanet = (2 * keys + 2 * values + 2 * 4) * hidden + (2 * keys + values) * 4 + values * hidden
    attention = (2 * 4 * 8 + 2 * 2 * 8 + 4 * 8) * hidden  # queries with gates, keys and values, output
    moe = experts * hidden + (3 * config["shared_expert_intermediate_size"] + 1) * hidden
    moe += chosen * 3 * config["moe_intermediate_size"] * hidden
    past = 1000 // 2 * 2 * 4 * 8  # half the context; a score and a weighted value per query channel
    state = 4 * (4 * 8 * 12)  # per value head a matrix of key dim x value dim
    multiply_adds = deltanet + attention + 2 * moe + vocab * hidden + past + state
    assert forward_flops(QWEN3_NEXT, config, context_length=1000) == 2 * multiply_adds


def test_tied_embeddings_multiply_once() -> None:
    config = tiny_config()
    assert forward_flops(QWEN3_NEXT, config, 8) == forward_flops(QWEN3_NEXT, config | {"tie_word_embeddings": True}, 8)


def test_training_memory_by_hand() -> None:
    teacher, student = paper_config("80B-A3B"), paper_config("23A2B")
    costs = footprint(QWEN3_NEXT, student, teacher, context_length=4096, settings=TrainingSettings(gpus=64))
    memory = costs.training
    assert memory.student_bytes == 12 * (23_176_328_256 + 631_907_840) // 64
    assert 3 * memory.gradient_bytes == memory.student_bytes
    assert memory.teacher_bytes == 2 * (79_674_391_296 + 1_650_471_424) // 64
    linear_layer = (count(QWEN3_NEXT, teacher).parts["deltanet"] // 36) + 2 * 2048  # mixer and norms
    linear_layer += 512 * 2048 + (3 * 512 + 1) * 2048 + 512 * 3 * 512 * 2048  # router, shared, routed
    around, teacher_around = 2 * 151936 * 1536, 2 * 151936 * 2048  # embedding and lm_head
    projection = 2 * 1536 * 1536 + 3 * 1536  # MTP's, and its norms
    teacher_projection = 2 * 2048 * 2048 + 3 * 2048
    around += 1536 + projection
    assert memory.gathered_bytes == 2 * (around + 2048 + teacher_around + teacher_projection)
    activations = memory.teacher_layer_bytes - 3 * 2 * linear_layer
    assert 0 < activations < memory.layer_bytes / 4
    linear_layer = count(QWEN3_NEXT, student).parts["deltanet"] // 27 + 2 * 1536
    linear_layer += 256 * 1536 + (3 * 512 + 1) * 1536 + 256 * 3 * 512 * 1536
    assert memory.layer_weights_bytes == (2 * 2 + 2 + 4) * linear_layer  # two gathered, its gradient, the last one's
    assert memory.around_gradient_bytes == (2 + 4) * around
    logits = 2 * 2 * 1024 + 4 * 6 * (2**24 // 151936)  # two chunks in bfloat16, six blocks in float32, per word
    states = 4096 * (4 * 4 * 1536 + 2 * 2048)
    assert memory.loss_bytes == 151936 * (logits + (4 + 2) * 1536) + states
    held = memory.student_bytes + memory.teacher_bytes + memory.gathered_bytes
    assert memory.peak_bytes == held + memory.activation_bytes + max(memory.loss_bytes, memory.layer_weights_bytes)
    less = costs.checkpointed_training
    assert less.activation_bytes < memory.activation_bytes / 5
    assert less.layer_inputs_bytes == 36 * 4096 * 2 * 1536
    alone = footprint(QWEN3_NEXT, student, teacher, 4096, TrainingSettings(gpus=1)).training
    assert alone.student_bytes == 64 * memory.student_bytes
    assert alone.gathered_bytes == 2 * (23_176_328_256 + 631_907_840)
    assert alone.layer_weights_bytes == 0
    assert alone.activation_bytes > memory.activation_bytes  # autocast copies inputs


def test_dtypes() -> None:
    config = tiny_config()
    half = footprint(QWEN3_NEXT, config | {"dtype": "float16"}, config, 16, TrainingSettings())
    full = footprint(QWEN3_NEXT, config | {"dtype": "float32"}, config, 16, TrainingSettings())
    assert full.checkpoint_bytes == 2 * half.checkpoint_bytes
    assert full.kv_cache_bytes == 2 * half.kv_cache_bytes
    assert half.state_bytes < full.state_bytes < 2 * half.state_bytes  # the recurrent state is float32 in both
    assert dtype_of({"torch_dtype": "float32"}) == "float32"
    with pytest.raises(UserError, match=r"'bfloat'.*did you mean 'bfloat16'"):
        dtype_of({"dtype": "bfloat"})


def test_a_target_larger_than_the_source_is_refused() -> None:
    family, config = read_config(RECIPES / "qwen3-next-80b-a3b.json")
    with pytest.raises(UserError, match="hidden_size 4096 is more than the source's 2048"):
        compare(family, config, Target(hidden_size=4096))


# --- what is printed --------------------------------------------------------------------------------------------------


def test_the_table_says_both_sides_and_every_convention() -> None:
    family, config = read_config(RECIPES / "qwen3-next-80b-a3b.json")
    target = load_recipe(RECIPES / "slimqwen-23a2b.yaml", model=Target)
    training = TrainingSettings(gpus=64, micro_batch_size=2, sequence_length=8192)
    text = comparison_table(compare(family, config, target, context_length=4096, training=training))
    rows = {line[:42].strip(): line.split()[-3:] for line in text.splitlines()}
    assert rows["parameters [1]"] == ["79,674,391,296", "23,176,328,256", "29.1%"]
    assert rows["routed experts"] == ["77,309,411,328", "21,743,271,936", "28.1%"]
    assert rows["MTP module, apart"] == ["1,650,471,424", "631,907,840", "38.3%"]
    for words in (
        "4,096 tokens",
        "per GPU of 64",
        "of 16,384 tokens",
        "2 x 8,192",
        "3.8B and 2.0B",
        "no convention gives both",
        "Predicted",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120


def test_plan_prints_all_of_it_without_torch() -> None:
    script = (
        "import sys; from slimqwen.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    command = ("plan", RECIPES / "qwen3-next-24b-a2b.json", "--target", RECIPES / "slimqwen-6a1b.yaml", "--json")
    result = subprocess.run([sys.executable, "-c", script, *map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["footprint"]["after"]["training"]["peak_bytes"] > 0
    for side in ("before", "after"):
        for training in ("training", "checkpointed_training"):
            for derived in ("activation_bytes", "peak_bytes"):
                printed["footprint"][side][training].pop(derived)
    again = Comparison.model_validate(printed)
    assert again.after.total_parameters == 5_866_292_800
    assert again.footprint.after.context_length == 32_768
