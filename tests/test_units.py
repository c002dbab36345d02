"""Heads and neurons: which stay in each block, and that a target asks for what can be had."""

import pytest
import torch
from tiny import tiny_config

from slimqwen.core.errors import UserError
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.planning.units import highest, kept_units
from slimqwen.recipe import Target
from slimqwen.shapes.target import completed, target_config, target_sizes


def sums_of(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:  # type: ignore[type-arg]
    """Random statistics of every writer and of every expert's neurons."""
    generator = torch.Generator().manual_seed(seed)
    sizes = QWEN3_NEXT.sizes(config)
    sums = {}
    for _, tensor, axes in QWEN3_NEXT.writers(config):
        shape = [sizes[axis] for axis in (axes if len(axes) == 1 else axes[:-1])]
        name = "abs_sums" if len(axes) == 1 else "norm_sums"
        sums[f"input/{tensor}/{name}"] = torch.rand(shape, generator=generator, dtype=torch.float64)
    for block in QWEN3_NEXT.moe_blocks(config):
        sums[f"experts/{block.name}/neuron_abs_sums"] = torch.rand(8, 16, generator=generator, dtype=torch.float64)
    return sums


def choose(config: dict, sums: dict[str, torch.Tensor], target: Target, layers: list[int]) -> dict:  # type: ignore[type-arg]
    full = completed(QWEN3_NEXT, target, config)
    return kept_units(QWEN3_NEXT, config, sums, layers, target_sizes(QWEN3_NEXT, config, full))  # type: ignore[arg-type]


def test_the_highest_stay_in_order_and_the_lower_wins_a_tie() -> None:
    assert highest(torch.tensor([3.0, 1.0, 2.0, 3.0]), 2) == [0, 3]
    assert highest(torch.tensor([2.0, 1.0, 2.0, 2.0]), 2) == [0, 2]
    assert highest(torch.tensor([[1.0, 5.0, 3.0], [4.0, 2.0, 4.0]]), 2) == [[1, 2], [0, 2]]


def test_nothing_is_chosen_where_nothing_is_cut() -> None:
    config = tiny_config()
    assert choose(config, sums_of(config), Target(num_experts=4, hidden_size=16), [0, 1, 2, 3]) == {}


def test_a_kv_head_scores_with_all_its_query_heads() -> None:
    config = tiny_config()
    sums = sums_of(config)
    sums["input/model.layers.3.self_attn.o_proj.weight/norm_sums"] = torch.tensor([[5.0, 0.0], [3.0, 3.0]])
    sums["input/mtp.layers.0.self_attn.o_proj.weight/norm_sums"] = torch.tensor([[5.0, 2.0], [3.0, 3.0]])
    kept = choose(config, sums, Target(num_key_value_heads=1), [0, 1, 2, 3])
    assert kept == {"kv_head": {"model.layers.3": [1], "mtp.layers.0": [0]}}


def test_inner_heads_are_chosen_within_each_outer_one() -> None:
    config = tiny_config()
    sums = sums_of(config)
    name = "input/model.layers.{}.linear_attn.out_proj.weight/norm_sums"
    for layer in range(3):
        sums[name.format(layer)] = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    kept = choose(config, sums, Target(linear_num_value_heads=2), [0, 2, 3])
    assert kept == {"value_head": {"model.layers.0": [[1], [0]], "model.layers.2": [[1], [0]]}}
    both = choose(config, sums, Target(linear_num_key_heads=1, linear_num_value_heads=1), [0])
    assert both["key_head"] == {"model.layers.0": [1]} and both["value_head"] == {"model.layers.0": [[1], [0]]}


def test_neurons_are_chosen_per_expert_and_per_shared_expert() -> None:
    config = tiny_config()
    sums = sums_of(config)
    kept = choose(config, sums, Target(moe_intermediate_size=4, shared_expert_intermediate_size=6), [1])
    assert kept.keys() == {"expert_neuron", "shared_neuron"}
    assert kept["expert_neuron"].keys() == kept["shared_neuron"].keys() == {"model.layers.1", "mtp.layers.0"}
    scores = sums["experts/model.layers.1/neuron_abs_sums"]
    assert kept["expert_neuron"]["model.layers.1"] == [sorted(row.topk(4).indices.tolist()) for row in scores]
    shared = sums["input/model.layers.1.mlp.shared_expert.down_proj.weight/abs_sums"]
    assert kept["shared_neuron"]["model.layers.1"] == sorted(shared.topk(6).indices.tolist())


def test_a_target_that_names_the_outer_heads_keeps_the_ratio() -> None:
    config = tiny_config()
    full = completed(QWEN3_NEXT, Target(num_key_value_heads=1, linear_num_key_heads=1), config)
    assert (full.num_attention_heads, full.linear_num_value_heads) == (2, 2)
    new = target_config(QWEN3_NEXT, config, full)
    assert (new["num_key_value_heads"], new["num_attention_heads"], new["linear_num_value_heads"]) == (1, 2, 2)
    assert new["layer_types"] == config["layer_types"]


WRONG = {
    "no dense layer": (Target(intermediate_size=8), "intermediate_size, which no layer of this qwen3_next has"),
    "not a multiple": (Target(num_attention_heads=3), "num_attention_heads 3 is not a multiple of 2"),
    "inner grows": (
        Target(linear_num_key_heads=1, linear_num_value_heads=4),
        "4 value_heads per unit of the outer axis",
    ),
    "more than there is": (Target(moe_intermediate_size=17), "moe_intermediate_size 17 is more than the source's 16"),
}


@pytest.mark.parametrize(("target", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_had_is_told_in_a_sentence(target: Target, message: str) -> None:
    with pytest.raises(UserError, match=message):
        completed(QWEN3_NEXT, target, tiny_config())
