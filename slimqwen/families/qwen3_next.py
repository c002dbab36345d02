"""Qwen3-Next: Gated DeltaNet and gated full attention (3:1), every layer a mixture of experts, one MTP module.

Names and shapes as in the released checkpoint and in Transformers' `Qwen3NextForCausalLM`.
"""

from copy import deepcopy

from slimqwen.errors import UserError
from slimqwen.families.axes import Axis, cat, each
from slimqwen.families.family import Block, Config, ExpertTable, Family, Part, Table

VOCAB = Axis("vocab")
HIDDEN = Axis("hidden")
EXPERT = Axis("expert", scope="block")
EXPERT_NEURON = Axis("expert_neuron", scope="expert")
SHARED_NEURON = Axis("shared_neuron", scope="block")
KV_HEAD = Axis("kv_head", scope="block")
QUERY_HEAD = Axis("query_head", scope="block")  # within one KV head's group: the checkpoint's layout is rectangular
HEAD_DIM = Axis("head_dim")
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

ATTENTION: Table = {
    "self_attn.q_proj.weight": (each(KV_HEAD, each(QUERY_HEAD, cat(query=HEAD_DIM, gate=HEAD_DIM))), HIDDEN),
    "self_attn.k_proj.weight": (each(KV_HEAD, HEAD_DIM), HIDDEN),
    "self_attn.v_proj.weight": (each(KV_HEAD, HEAD_DIM), HIDDEN),
    "self_attn.q_norm.weight": (HEAD_DIM,),
    "self_attn.k_norm.weight": (HEAD_DIM,),
    "self_attn.o_proj.weight": (HIDDEN, each(KV_HEAD, each(QUERY_HEAD, HEAD_DIM))),
}

LAYER_NORMS: Table = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}

# Where experts are merged, router rows are still selected: the base's row speaks for its group (method.md section 4).
ROUTER: Table = {"mlp.gate.weight": (EXPERT, HIDDEN)}

ROUTED_EXPERTS = ExpertTable(
    axis=EXPERT,
    per_expert={
        "mlp.experts.{expert}.gate_proj.weight": (EXPERT_NEURON, HIDDEN),
        "mlp.experts.{expert}.up_proj.weight": (EXPERT_NEURON, HIDDEN),
        "mlp.experts.{expert}.down_proj.weight": (HIDDEN, EXPERT_NEURON),
    },
    fused={
        "mlp.experts.gate_up_proj": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
        "mlp.experts.down_proj": ("mlp.experts.{expert}.down_proj.weight",),
    },
)

SHARED_EXPERT: Table = {
    "mlp.shared_expert.gate_proj.weight": (SHARED_NEURON, HIDDEN),
    "mlp.shared_expert.up_proj.weight": (SHARED_NEURON, HIDDEN),
    "mlp.shared_expert.down_proj.weight": (HIDDEN, SHARED_NEURON),
    "mlp.shared_expert_gate.weight": (1, HIDDEN),
}

MTP_PROJECTION: Table = {"mtp.fc.weight": (HIDDEN, cat(embedding=HIDDEN, hidden=HIDDEN))}
MTP_NORMS: Table = {
    "mtp.pre_fc_norm_embedding.weight": (HIDDEN,),
    "mtp.pre_fc_norm_hidden.weight": (HIDDEN,),
    "mtp.norm.weight": (HIDDEN,),
}

MIXERS: dict[str, tuple[Part, Table]] = {
    "linear_attention": ("deltanet", DELTANET),
    "full_attention": ("attention", ATTENTION),
}


def _decoder_layer(prefix: str, layer_type: str, layer: int | None, is_mtp: bool = False) -> Block:
    part, mixer = MIXERS[layer_type]
    tables: dict[Part, Table] = {"norm": LAYER_NORMS, part: mixer, "router": ROUTER, "shared_experts": SHARED_EXPERT}
    return Block(prefix, tables, ROUTED_EXPERTS, layer, is_mtp)


def layer_blocks(config: Config) -> list[Block]:
    return [_decoder_layer(f"model.layers.{layer}.", kind, layer) for layer, kind in enumerate(config["layer_types"])]


def surroundings(config: Config) -> list[Block]:
    embeddings: Table = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    if not config["tie_word_embeddings"]:
        embeddings = {**embeddings, "lm_head.weight": (VOCAB, HIDDEN)}
    blocks = [Block("", {"embedding": embeddings, "norm": {"model.norm.weight": (HIDDEN,)}})]
    if config["num_nextn_predict_layers"]:
        blocks.append(Block("", {"mtp_projection": MTP_PROJECTION, "norm": MTP_NORMS}, is_mtp=True))
        blocks.append(_decoder_layer("mtp.layers.0.", "full_attention", None, is_mtp=True))
    return blocks


def normalise(config: Config) -> Config:
    """Make explicit what older config.json files leave to a default; refuse what the table does not describe."""
    config = deepcopy(config)
    # Serving engines take the number of MTP layers from this key and 1 where it is missing (vLLM's qwen3_next_mtp).
    config.setdefault("num_nextn_predict_layers", 1)
    config.setdefault("tie_word_embeddings", False)
    for field in ("num_hidden_layers", "num_experts", "num_experts_per_tok"):
        if not isinstance(config.get(field), int) or config[field] <= 0:
            raise UserError(f"config.json: '{field}' must be a positive whole number, is {config.get(field)!r}.")
    if config["num_nextn_predict_layers"] not in (0, 1):
        raise UserError(
            f"config.json: num_nextn_predict_layers is {config['num_nextn_predict_layers']!r}; Qwen3-Next has one MTP module "
            "(1), which is applied repeatedly, or none (0)."
        )
    layers = config["num_hidden_layers"]
    if config.get("layer_types") is None:
        interval = config.get("full_attention_interval", 4)
        if not isinstance(interval, int) or interval <= 0:
            raise UserError(f"config.json: 'full_attention_interval' must be a positive whole number, is {interval!r}.")
        config["layer_types"] = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]
    if not isinstance(config["layer_types"], list) or not all(isinstance(kind, str) for kind in config["layer_types"]):
        raise UserError("config.json: 'layer_types' must be a list of words, one per layer.")
    if len(config["layer_types"]) != layers:
        raise UserError(
            f"config.json: layer_types names {len(config['layer_types'])} layers, num_hidden_layers is {layers}."
        )
    unknown = sorted({kind for kind in config["layer_types"] if kind not in MIXERS})
    if unknown:
        raise UserError(f"config.json: layer_types has {', '.join(unknown)}; known are {', '.join(MIXERS)}.")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise UserError("config.json: dense layers (mlp_only_layers, decoder_sparse_step > 1) are not supported yet.")
    if config.get("attention_bias"):
        raise UserError("config.json: attention_bias true is not supported: Qwen3-Next was released without biases.")
    if config["num_experts_per_tok"] > config["num_experts"]:
        raise UserError(
            f"config.json: num_experts_per_tok {config['num_experts_per_tok']} is more than num_experts {config['num_experts']}."
        )
    return config


def with_serving_keys(config: Config) -> Config:
    """Write old and new forms of the keys that differ between Transformers 5 and the serving engines (formats.md 1)."""
    config = deepcopy(config)
    rope = config.get("rope_parameters")
    if rope:
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                config.setdefault(key, rope[key])
    elif "rope_theta" in config and not config.get("rope_scaling"):
        new_form = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        config["rope_parameters"] = new_form | {"partial_rotary_factor": config.get("partial_rotary_factor", 0.25)}
    # SGLang ignores layer_types and counts: write the interval wherever it tells the truth about every layer.
    full = attention_layers(config)
    interval = full[0] + 1 if full else 0
    periodic = interval > 0 and full == list(range(interval - 1, len(config["layer_types"]), interval))
    if periodic:
        config["full_attention_interval"] = interval
    else:
        config.pop("full_attention_interval", None)
    if config["num_nextn_predict_layers"]:  # what Transformers' own MtpModel asks for
        config["num_mtp_layers"] = config["num_nextn_predict_layers"]
        config["mtp_layer_types"] = ["full_attention"] * config["num_nextn_predict_layers"]
    else:
        config.pop("num_mtp_layers", None)
        config.pop("mtp_layer_types", None)
    return config


def serving_note(config: Config) -> str | None:
    """What a user should know before serving a model of this config, if anything."""
    if "full_attention_interval" in with_serving_keys(config):
        return None
    return (
        "the layers that stay no longer alternate regularly: Transformers and vLLM read layer_types and load the result, "
        "SGLang counts by full_attention_interval and does not (pruning.depth: last keeps the pattern)."
    )


def attention_layers(config: Config) -> list[int]:
    """Layers that keep a KV cache; at least one must remain (formats.md: a linear-only stack fails with a cache)."""
    return [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    vocab=VOCAB,
    hidden=HIDDEN,
    expert=EXPERT,
    router="mlp.gate.weight",
    fields=FIELDS,
    normalise=normalise,
    layer_blocks=layer_blocks,
    attention_layers=attention_layers,
    surroundings=surroundings,
    with_serving_keys=with_serving_keys,
    serving_note=serving_note,
    default_layout="per_expert",
)
