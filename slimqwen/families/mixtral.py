"""Mixtral (8x7B, 8x22B): full attention without norms, every layer a mixture of experts.

Names and shapes as in the released checkpoints; Transformers' `MixtralForCausalLM` has `mlp` where they have
`block_sparse_moe`, and loads either.
"""

from slimqwen.families.canonical import (
    check_layers_and_experts,
    full_attention_only,
    renamed,
    with_both_rope_forms,
    without_full_attention_only,
)
from slimqwen.families.family import Block, Config, Family, Table, positive
from slimqwen.families.tables import (
    ATTENTION_FIELDS,
    EXPERT,
    HIDDEN,
    MLP_INPUT,
    VOCAB,
    around_the_layers,
    attention,
    decoder_layer,
    routed_experts,
)

ATTENTION = attention()
ROUTER: Table = {"block_sparse_moe.gate.weight": (EXPERT, MLP_INPUT)}
ROUTED_EXPERTS = routed_experts("block_sparse_moe.experts.", gate="w1", up="w3", down="w2")

CANONICAL = {"num_local_experts": "num_experts", "intermediate_size": "moe_intermediate_size"}


def layer_blocks(config: Config) -> list[Block]:
    layers = range(config["num_hidden_layers"])
    return [decoder_layer(layer, ATTENTION, {"router": ROUTER}, ROUTED_EXPERTS) for layer in layers]


def normalise(config: Config) -> Config:
    for key in CANONICAL:
        positive(config, key)
    config = renamed(config, CANONICAL)
    check_layers_and_experts(config)
    config = full_attention_only(config)
    config["mlp_layer_types"] = ["sparse"] * config["num_hidden_layers"]
    return config


def to_disk(config: Config) -> Config:
    """Write head_dim too, which released files leave out: hidden_size / num_attention_heads may no longer be it."""
    config = without_full_attention_only(renamed(config, {ours: theirs for theirs, ours in CANONICAL.items()}))
    del config["mlp_layer_types"]
    return with_both_rope_forms(config)


def module_name(name: str, config: Config) -> str:
    return name.replace(".block_sparse_moe.", ".mlp.")


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    vocab=VOCAB,
    hidden=HIDDEN,
    expert=EXPERT,
    router="block_sparse_moe.gate.weight",
    fields=ATTENTION_FIELDS,
    normalise=normalise,
    to_disk=to_disk,
    layer_blocks=layer_blocks,
    surroundings=around_the_layers,
    module_name=module_name,
    default_layout="per_expert",
)
