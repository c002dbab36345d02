"""OLMoE (1B-7B): full attention with norms over all queries and all keys at once, every layer a mixture of experts.

Names and shapes as in the released checkpoint and in Transformers' `OlmoeForCausalLM`.
"""

from slimqwen.core.errors import UserError
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
    KEYS,
    MLP_INPUT,
    QUERIES,
    VOCAB,
    around_the_layers,
    attention,
    decoder_layer,
    routed_experts,
)

# Their mean square is over all heads: what is cut of the heads changes it for those that stay, as with the hidden size.
ATTENTION = attention(norms={"self_attn.q_norm.weight": (QUERIES,), "self_attn.k_norm.weight": (KEYS,)})
ROUTER: Table = {"mlp.gate.weight": (EXPERT, MLP_INPUT)}
ROUTED_EXPERTS = routed_experts("mlp.experts.")


def layer_blocks(config: Config) -> list[Block]:
    layers = range(config["num_hidden_layers"])
    return [decoder_layer(layer, ATTENTION, {"router": ROUTER}, ROUTED_EXPERTS) for layer in layers]


def validate(config: Config) -> None:
    """Refuse heads that do not span hidden_size: q_norm has that many entries, and a head hidden_size / num_attention_heads dims, in Transformers and in vLLM."""
    hidden, heads, head_dim = (positive(config, key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if heads * head_dim != hidden:
        raise UserError(
            f"OLMoE's heads must span its hidden_size, and {heads} heads of {head_dim} do not span {hidden}: "
            + (
                f"choose a hidden_size that is a multiple of {head_dim}, and as many num_attention_heads."
                if hidden % head_dim
                else f"ask for num_attention_heads {hidden // head_dim}, and num_key_value_heads in the same proportion."
            )
        )


def normalise(config: Config) -> Config:
    """Read the size of an expert from intermediate_size: there are no dense layers."""
    positive(config, "intermediate_size")
    config = renamed(config, {"intermediate_size": "moe_intermediate_size"})
    check_layers_and_experts(config)
    config = full_attention_only(config)
    config["mlp_layer_types"] = ["sparse"] * config["num_hidden_layers"]
    validate(config)
    return config


def to_disk(config: Config) -> Config:
    config = without_full_attention_only(renamed(config, {"moe_intermediate_size": "intermediate_size"}))
    del config["mlp_layer_types"], config["head_dim"]
    return with_both_rope_forms(config)


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    vocab=VOCAB,
    hidden=HIDDEN,
    expert=EXPERT,
    router="mlp.gate.weight",
    fields=ATTENTION_FIELDS,
    normalise=normalise,
    to_disk=to_disk,
    layer_blocks=layer_blocks,
    surroundings=around_the_layers,
    validate=validate,
    default_layout="per_expert",
)
