"""Qwen3-Next: Gated DeltaNet and gated full attention (3:1), every layer a mixture of experts, one MTP module.

Names and shapes as in the released checkpoint and in Transformers' `Qwen3NextForCausalLM`.
"""

from collections.abc import Collection

from slimqwen.errors import UserError
from slimqwen.families.axes import Axis, cat, each
from slimqwen.families.canonical import (
    check_layer_types,
    check_layers_and_experts,
    mlp_layer_types,
    periodic_layer_types,
    with_both_rope_forms,
    with_mlp_only_layers,
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
    PER_HEAD_NORMS,
    QUERY_HEAD,
    SHARED_NEURON,
    VOCAB,
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
GROUP_VALUES = each(VALUE_HEAD, VALUE_DIM)

DELTANET: Table = {
    "linear_attn.in_proj_qkvz.weight": (
        each(KEY_HEAD, cat(q=KEY_DIM, k=KEY_DIM, v=GROUP_VALUES, z=GROUP_VALUES)),
        HIDDEN,
    ),
    "linear_attn.in_proj_ba.weight": (each(KEY_HEAD, cat(b=VALUE_HEAD, a=VALUE_HEAD)), HIDDEN),
    "linear_attn.conv1d.weight": (cat(q=KEYS, k=KEYS, v=VALUES), 1, CONV_KERNEL),  # not interleaved, unlike in_proj
    "linear_attn.A_log": (each(KEY_HEAD, VALUE_HEAD),),
    "linear_attn.dt_bias": (each(KEY_HEAD, VALUE_HEAD),),
    "linear_attn.norm.weight": (VALUE_DIM,),
    "linear_attn.out_proj.weight": (HIDDEN, VALUES),
}

DELTANET_RECALL = Recall(
    cached={},
    read={},
    state={
        "recurrent": (each(KEY_HEAD, VALUE_HEAD), KEY_DIM, VALUE_DIM),
        "convolution": (cat(q=KEYS, k=KEYS, v=VALUES), CONV_KERNEL),
    },
)

ATTENTION = attention(
    queries=each(KV_HEAD, each(QUERY_HEAD, cat(query=HEAD_DIM, gate=HEAD_DIM))), norms=PER_HEAD_NORMS
)

# Where experts are merged, router rows are still selected: the base's row speaks for its group (method.md section 4).
ROUTER: Table = {"mlp.gate.weight": (EXPERT, HIDDEN)}

ROUTED_EXPERTS = routed_experts("mlp.experts.")

SHARED_EXPERT: Table = {
    **gated_mlp("mlp.shared_expert.", SHARED_NEURON),
    "mlp.shared_expert_gate.weight": (1, HIDDEN),
}

MTP_PROJECTION: Table = {"mtp.fc.weight": (HIDDEN, cat(embedding=HIDDEN, hidden=HIDDEN))}
MTP_NORMS: Table = {
    "mtp.pre_fc_norm_embedding.weight": (HIDDEN,),
    "mtp.pre_fc_norm_hidden.weight": (HIDDEN,),
    "mtp.norm.weight": (HIDDEN,),
}

MIXERS: dict[str, tuple[Part, Table, Recall]] = {
    "linear_attention": ("deltanet", DELTANET, DELTANET_RECALL),
    "full_attention": ("attention", ATTENTION, ATTENTION_RECALL),
}


def decoder_layer(prefix: str, mixer: str, mlp: str, layer: int | None) -> Block:
    part, table, recall = MIXERS[mixer]
    tables: dict[Part, Table] = {"norm": LAYER_NORMS, part: table}
    if mlp == "dense":
        tables["dense_mlp"] = gated_mlp("mlp.", DENSE_NEURON)
        return Block(prefix, tables, layer=layer, recall=recall)
    tables |= {"router": ROUTER, "shared_experts": SHARED_EXPERT}
    return Block(prefix, tables, ROUTED_EXPERTS, layer, is_mtp=layer is None, recall=recall)


def layer_blocks(config: Config) -> list[Block]:
    kinds = zip(config["layer_types"], config["mlp_layer_types"], strict=True)
    return [decoder_layer(f"model.layers.{i}.", mixer, mlp, i) for i, (mixer, mlp) in enumerate(kinds)]


def surroundings(config: Config) -> list[Block]:
    embeddings: Table = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    if not config["tie_word_embeddings"]:
        embeddings = {**embeddings, "lm_head.weight": (VOCAB, HIDDEN)}
    blocks = [Block("", {"embedding": embeddings, "norm": {"model.norm.weight": (HIDDEN,)}})]
    if config["num_nextn_predict_layers"]:
        blocks.append(Block("", {"mtp_projection": MTP_PROJECTION, "norm": MTP_NORMS}, is_mtp=True))
        blocks.append(decoder_layer("mtp.layers.0.", "full_attention", "sparse", None))
    return blocks


def normalise(config: Config) -> Config:
    """Make explicit what older config.json files leave to a default; refuse what the table does not describe."""
    # Serving engines take the number of MTP layers from this key and 1 where it is missing (vLLM's qwen3_next_mtp).
    config = {"num_nextn_predict_layers": 1, "tie_word_embeddings": False, "intermediate_size": 5632} | config
    check_layers_and_experts(config)
    if config["num_nextn_predict_layers"] not in (0, 1):
        raise UserError(
            f"config.json: num_nextn_predict_layers is {config['num_nextn_predict_layers']!r}; Qwen3-Next has one MTP module "
            "(1), which is applied repeatedly, or none (0)."
        )
    if config.get("attention_bias"):
        raise UserError("config.json: attention_bias true is not supported: Qwen3-Next was released without biases.")
    if config.get("layer_types") is None:
        config["layer_types"] = periodic_layer_types(config)
    check_layer_types(config, MIXERS)
    config["mlp_layer_types"] = mlp_layer_types(config)
    return config


def to_disk(config: Config) -> Config:
    """Old and new forms of the keys that differ between Transformers 5 and the serving engines (formats.md 1)."""
    config = with_both_rope_forms(with_mlp_only_layers(config), partial_rotary_factor=0.25)
    # SGLang ignores layer_types and counts: write the interval wherever it tells the truth about every layer.
    interval = full_attention_interval(config)
    if interval is None:
        config.pop("full_attention_interval", None)
    else:
        config["full_attention_interval"] = interval
    if config["num_nextn_predict_layers"]:  # what Transformers' own MtpModel asks for
        config["num_mtp_layers"] = config["num_nextn_predict_layers"]
        config["mtp_layer_types"] = ["full_attention"] * config["num_nextn_predict_layers"]
    else:
        config.pop("num_mtp_layers", None)
        config.pop("mtp_layer_types", None)
    return config


def full_attention_interval(config: Config) -> int | None:
    """n where every n-th layer attends in full and no other; None where the pattern is not regular."""
    full = [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    if full and full == list(range(full[0], len(config["layer_types"]), full[0] + 1)):
        return full[0] + 1
    return None


def serving_note(config: Config) -> str | None:
    if full_attention_interval(config) is not None:
        return None
    return (
        "the layers that stay no longer alternate regularly: Transformers and vLLM read layer_types and load the result, "
        "SGLang counts by full_attention_interval and does not (pruning.depth: last keeps the pattern)."
    )


def without_absent_mtp(config: Config, names: Collection[str]) -> Config:
    """Checkpoints whose MTP module was dropped (by Transformers, say) still announce it in config.json."""
    return config if any(name.startswith("mtp.") for name in names) else {**config, "num_nextn_predict_layers": 0}


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    vocab=VOCAB,
    hidden=HIDDEN,
    expert=EXPERT,
    router="mlp.gate.weight",
    fields=FIELDS,
    normalise=normalise,
    to_disk=to_disk,
    layer_blocks=layer_blocks,
    surroundings=surroundings,
    serving_note=serving_note,
    as_found=without_absent_mtp,
    mtp_config={"num_hidden_layers": 1, "layer_types": ["full_attention"], "mlp_only_layers": []},
    default_layout="per_expert",
)
