"""Qwen3-Next: Gated DeltaNet and gated full attention (3:1), every layer a mixture of experts, one MTP module.

Names and shapes as in the released checkpoint and in Transformers' `Qwen3NextForCausalLM`.
"""

from collections.abc import Collection, Mapping

from slimqwen.core.errors import UserError
from slimqwen.families.axes import Axis, Read, cat, each
from slimqwen.families.canonical import (
    check_layer_types,
    check_layers_and_experts,
    check_one_mtp_module,
    full_attention_interval,
    mlp_layer_types,
    periodic_layer_types,
    with_both_rope_forms,
    with_full_attention_interval,
    with_mlp_only_layers,
    with_mtp_layer_types,
)
from slimqwen.families.family import Block, Config, Family, Part, Recall, Table
from slimqwen.families.tables import (
    ATTENTION_RECALL,
    DENSE_NEURON,
    EXPERT,
    EXPERT_NEURON,
    HEAD_DIM,
    HIDDEN,
    KV_HEAD,
    LAYER_NORMS,
    MIXER_INPUT,
    MLP_INPUT,
    PER_HEAD_NORMS,
    QUERY_HEAD,
    SHARED_NEURON,
    VOCAB,
    around_the_layers,
    attention,
    gated_mlp,
    routed_experts,
)

KEY_HEAD = Axis("key_head", scope="block")
VALUE_HEAD = Axis("value_head", scope="block")  # within one key head
KEY_DIM = Axis("key_dim")
VALUE_DIM = Axis("value_dim")
CONV_KERNEL = Axis("conv_kernel")

FIELDS = {
    "vocab_size": (VOCAB,),
    "hidden_size": (HIDDEN,),
    "num_experts": (EXPERT,),
    "moe_intermediate_size": (EXPERT_NEURON,),
    "shared_expert_intermediate_size": (SHARED_NEURON,),
    "intermediate_size": (DENSE_NEURON,),
    "num_key_value_heads": (KV_HEAD,),
    "num_attention_heads": (KV_HEAD, QUERY_HEAD),
    "head_dim": (HEAD_DIM,),
    "linear_num_key_heads": (KEY_HEAD,),
    "linear_num_value_heads": (KEY_HEAD, VALUE_HEAD),
    "linear_key_head_dim": (KEY_DIM,),
    "linear_value_head_dim": (VALUE_DIM,),
    "linear_conv_kernel_dim": (CONV_KERNEL,),
}

KEYS = each(KEY_HEAD, KEY_DIM)
VALUES = each(KEY_HEAD, each(VALUE_HEAD, VALUE_DIM))
VALUE_HEADS = each(KEY_HEAD, VALUE_HEAD)
GROUP_VALUES = each(VALUE_HEAD, VALUE_DIM)

DELTANET_CORE: Table = {
    "linear_attn.conv1d.weight": (cat(q=KEYS, k=KEYS, v=VALUES), 1, CONV_KERNEL),  # not interleaved, unlike in_proj
    "linear_attn.A_log": (VALUE_HEADS,),
    "linear_attn.dt_bias": (VALUE_HEADS,),
    "linear_attn.norm.weight": (VALUE_DIM,),
    "linear_attn.out_proj.weight": (HIDDEN, VALUES),
}

DELTANET: Table = {
    "linear_attn.in_proj_qkvz.weight": (
        each(KEY_HEAD, cat(q=KEY_DIM, k=KEY_DIM, v=GROUP_VALUES, z=GROUP_VALUES)),
        MIXER_INPUT,
    ),
    "linear_attn.in_proj_ba.weight": (each(KEY_HEAD, cat(b=VALUE_HEAD, a=VALUE_HEAD)), MIXER_INPUT),
    **DELTANET_CORE,
}

DELTANET_RECALL = Recall(
    cached={},
    read={},
    state={
        "recurrent": (each(KEY_HEAD, VALUE_HEAD), KEY_DIM, VALUE_DIM),
        "convolution": (cat(q=KEYS, k=KEYS, v=VALUES), CONV_KERNEL),
    },
)

ATTENTION = attention(queries=each(KV_HEAD, each(QUERY_HEAD, cat(query=HEAD_DIM, gate=HEAD_DIM))), norms=PER_HEAD_NORMS)

# Where experts are merged, router rows are still selected: the base's row stands for its group (method.md section 4).
ROUTER: Table = {"mlp.gate.weight": (EXPERT, MLP_INPUT)}

ROUTED_EXPERTS = routed_experts("mlp.experts.")

SHARED_EXPERT: Table = {
    **gated_mlp("mlp.shared_expert.", SHARED_NEURON),
    "mlp.shared_expert_gate.weight": (1, MLP_INPUT),
}

MTP_PROJECTION: Table = {
    "mtp.fc.weight": (
        HIDDEN,
        cat(
            embedding=Read(HIDDEN, "mtp.pre_fc_norm_embedding.weight"),
            hidden=Read(HIDDEN, "mtp.pre_fc_norm_hidden.weight"),
        ),
    )
}
MTP_NORMS: Table = {
    "mtp.pre_fc_norm_embedding.weight": (HIDDEN,),
    "mtp.pre_fc_norm_hidden.weight": (HIDDEN,),
    "mtp.norm.weight": (HIDDEN,),
}

Mixers = Mapping[str, tuple[Part, Table, Recall]]
"""Word of layer_types -> what mixes tokens in such a layer."""

MIXERS: Mixers = {
    "linear_attention": ("deltanet", DELTANET, DELTANET_RECALL),
    "full_attention": ("attention", ATTENTION, ATTENTION_RECALL),
}


def decoder_layer(prefix: str, mixer: tuple[Part, Table, Recall], mlp: str, layer: int | None) -> Block:
    part, table, recall = mixer
    tables: dict[Part, Table] = {"norm": LAYER_NORMS, part: table}
    if mlp == "dense":
        tables["dense_mlp"] = gated_mlp("mlp.", DENSE_NEURON)
        return Block(prefix, tables, layer=layer, recall=recall)
    tables |= {"router": ROUTER, "shared_experts": SHARED_EXPERT}
    return Block(prefix, tables, ROUTED_EXPERTS, layer, is_mtp=layer is None, recall=recall)


def layer_blocks(config: Config, mixers: Mixers = MIXERS, root: str = "model.") -> list[Block]:
    kinds = zip(config["layer_types"], config["mlp_layer_types"], strict=True)
    return [decoder_layer(f"{root}layers.{i}.", mixers[mixer], mlp, i) for i, (mixer, mlp) in enumerate(kinds)]


def surroundings(config: Config, root: str = "model.") -> list[Block]:
    blocks = around_the_layers(config, root)
    if config["num_nextn_predict_layers"]:
        blocks.append(Block("", {"mtp_projection": MTP_PROJECTION, "norm": MTP_NORMS}, is_mtp=True))
        blocks.append(decoder_layer("mtp.layers.0.", MIXERS["full_attention"], "sparse", None))
    return blocks


def normalise(config: Config) -> Config:
    """Make explicit what older config.json files leave to a default; refuse what the table does not describe."""
    # Serving engines take the number of MTP layers from this key and 1 where it is missing (vLLM's qwen3_next_mtp).
    released: Config = {"num_nextn_predict_layers": 1, "tie_word_embeddings": False, "intermediate_size": 5632}
    config = released | config
    check_layers_and_experts(config)
    check_one_mtp_module(config)
    check_no_biases(config)
    config["layer_types"] = layer_types(config)
    config["mlp_layer_types"] = mlp_layer_types(config)
    return config


def check_no_biases(config: Config) -> None:
    if config.get("attention_bias"):
        raise UserError(
            f"config.json: attention_bias true is not supported: no released {config['model_type']} has biases."
        )


def layer_types(config: Config) -> list[str]:
    """Return the mixer of each layer, which older files only give an interval for."""
    if config.get("layer_types") is None:
        return periodic_layer_types(config)
    check_layer_types(config, MIXERS)
    return list(config["layer_types"])


def to_disk(config: Config) -> Config:
    """Write the old and the new forms of the keys that differ between Transformers 5 and the serving engines (formats.md 1)."""
    config = with_both_rope_forms(with_mlp_only_layers(config), partial_rotary_factor=0.25)
    return with_mtp_layer_types(with_full_attention_interval(config))


def serving_note(config: Config) -> str | None:
    if full_attention_interval(config) is not None:
        return None
    return (
        "the layers that stay no longer alternate regularly: Transformers, vLLM and llama.cpp read layer_types and load the "
        "result, SGLang counts by full_attention_interval and does not (pruning.depth: last keeps the pattern)."
    )


def without_absent_mtp(config: Config, names: Collection[str]) -> Config:
    """Correct the config of a checkpoint whose MTP module was dropped, as by Transformers, and is still announced."""
    return config if any(name.startswith("mtp.") for name in names) else {**config, "num_nextn_predict_layers": 0}


# Of its norms DeltaNet's own, with a gate, multiplies by its weight in the model's dtype.
FLOAT32_TENSORS = (
    *("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight", "A_log", "dt_bias"),
    *("mtp.norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight"),
)

QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    vocab=VOCAB,
    hidden=HIDDEN,
    expert=EXPERT,
    router="mlp.gate.weight",
    float32_tensors=FLOAT32_TENSORS,
    norm_offset=1.0,
    fields=FIELDS,
    normalise=normalise,
    to_disk=to_disk,
    layer_blocks=layer_blocks,
    surroundings=surroundings,
    serving_note=serving_note,
    as_found=without_absent_mtp,
    mtp_config={"num_hidden_layers": 1, "layer_types": ["full_attention"], "mlp_only_layers": []},
    default_layout="per_expert",
    published_active=(
        "For Qwen3-Next-80B-A3B and SlimQwen-23A2B the paper prints 3.8B and 2.0B, and no convention gives both: with the",
        "input embedding 3.87B and 2.11B (nearer), without 3.56B and 1.88B, without either table 3.25B and 1.65B.",
    ),
)
