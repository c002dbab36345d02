"""Qwen3-MoE (Qwen3-30B-A3B, 235B-A22B): full attention with a norm per head, routed experts only, dense layers if any.

Names and shapes as in the released checkpoints and in Transformers' `Qwen3MoeForCausalLM`.
"""

from slimqwen.families.canonical import (
    check_layers_and_experts,
    full_attention_only,
    mlp_layer_types,
    renamed,
    with_both_rope_forms,
    with_mlp_only_layers,
    without_full_attention_only,
)
from slimqwen.families.family import Block, Config, Family, Table
from slimqwen.families.tables import (
    ATTENTION_FIELDS,
    DENSE_NEURON,
    EXPERT,
    HIDDEN,
    MLP_INPUT,
    PER_HEAD_NORMS,
    VOCAB,
    around_the_layers,
    attention,
    decoder_layer,
    gated_mlp,
    routed_experts,
)

ATTENTION = attention(norms=PER_HEAD_NORMS)
ROUTER: Table = {"mlp.gate.weight": (EXPERT, MLP_INPUT)}
ROUTED_EXPERTS = routed_experts("mlp.experts.")
DENSE_MLP = gated_mlp("mlp.", DENSE_NEURON)


def layer_blocks(config: Config) -> list[Block]:
    return [
        decoder_layer(layer, ATTENTION, {"dense_mlp": DENSE_MLP})
        if kind == "dense"
        else decoder_layer(layer, ATTENTION, {"router": ROUTER}, ROUTED_EXPERTS)
        for layer, kind in enumerate(config["mlp_layer_types"])
    ]


def normalise(config: Config) -> Config:
    """Read the number of experts from num_experts, as in the released files, or num_local_experts, as Transformers 5 saves it."""
    config = renamed(config, {"num_local_experts": "num_experts"})
    config.setdefault("intermediate_size", 6144)
    check_layers_and_experts(config)
    config = full_attention_only(config)
    config["mlp_layer_types"] = mlp_layer_types(config)
    return config


def to_disk(config: Config) -> Config:
    config = with_both_rope_forms(with_mlp_only_layers(without_full_attention_only(config)))
    return config | {"num_local_experts": config["num_experts"]}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    vocab=VOCAB,
    hidden=HIDDEN,
    expert=EXPERT,
    router="mlp.gate.weight",
    fields={**ATTENTION_FIELDS, "intermediate_size": (DENSE_NEURON,)},
    normalise=normalise,
    to_disk=to_disk,
    layer_blocks=layer_blocks,
    surroundings=around_the_layers,
    default_layout="per_expert",
)
