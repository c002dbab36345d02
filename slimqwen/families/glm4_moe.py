"""GLM-4.5, 4.6 and 4.7 (`glm4_moe`): full attention, dense first layers, a router of sigmoids with a correction bias.

Names and shapes as in the released checkpoints and in Transformers' `Glm4MoeForCausalLM`. The MTP module is stored as
one more decoder layer, `model.layers.{num_hidden_layers}.`, and so is renumbered by a depth cut.
"""

from collections.abc import Collection

from slimqwen.core.errors import UserError, shown
from slimqwen.families.axes import Read, cat
from slimqwen.families.canonical import (
    check_layers_and_experts,
    check_one_mtp_module,
    renamed,
    with_both_rope_forms,
)
from slimqwen.families.family import Block, Config, Family, Part, Table, positive
from slimqwen.families.tables import (
    ATTENTION_FIELDS,
    ATTENTION_RECALL,
    DENSE_NEURON,
    EXPERT,
    HIDDEN,
    LAYER_NORMS,
    MLP_INPUT,
    PER_HEAD_NORMS,
    SHARED_NEURON,
    VOCAB,
    around_the_layers,
    attention,
    decoder_layer,
    gated_mlp,
    routed_experts,
)

DEFAULTS: Config = {  # Transformers' own, where a config.json has none
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "use_qk_norm": False,
}

ROUTED_EXPERTS = routed_experts("mlp.experts.")
MOE: dict[Part, Table] = {
    # The bias takes part in the choice of experts and in nothing else, and is float32 in every checkpoint.
    "router": {"mlp.gate.weight": (EXPERT, MLP_INPUT), "mlp.gate.e_score_correction_bias": (EXPERT,)},
    "shared_experts": gated_mlp("mlp.shared_experts.", SHARED_NEURON),
}
DENSE: dict[Part, Table] = {"dense_mlp": gated_mlp("mlp.", DENSE_NEURON)}

MTP_PROJECTION: Table = {
    "eh_proj.weight": (HIDDEN, cat(embedding=Read(HIDDEN, "enorm.weight"), hidden=Read(HIDDEN, "hnorm.weight")))
}
MTP_NORMS: Table = {"enorm.weight": (HIDDEN,), "hnorm.weight": (HIDDEN,), "shared_head.norm.weight": (HIDDEN,)}
# GLM-4.5 repeats the backbone's embedding and head in the MTP layer, GLM-4.6 does not; engines read either (vLLM #27597).
MTP_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}

COPIES: Table = {
    "embed_tokens.weight": (VOCAB, HIDDEN),
    "shared_head.head.weight": (VOCAB, Read(HIDDEN, "model.norm.weight")),  # the same numbers as lm_head's
}

MODULE_NAMES = MTP_COPIES | {  # below the MTP layer -> where modeling.mtp's module, or the backbone, holds it
    "eh_proj.weight": "mtp.fc.weight",
    "enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "shared_head.norm.weight": "mtp.norm.weight",
}


def attention_table(config: Config) -> Table:
    return attention(biases=config["attention_bias"], norms=PER_HEAD_NORMS if config["use_qk_norm"] else None)


def layer_blocks(config: Config) -> list[Block]:
    table = attention_table(config)
    return [
        decoder_layer(layer, table, DENSE) if mlp == "dense" else decoder_layer(layer, table, MOE, ROUTED_EXPERTS)
        for layer, mlp in enumerate(config["mlp_layer_types"])
    ]


def surroundings(config: Config) -> list[Block]:
    return around_the_layers(config) + [mtp_layer(config)] * config["num_nextn_predict_layers"]


def mtp_prefix(config: Config) -> str:
    return f"model.layers.{config['num_hidden_layers']}."


def mtp_layer(config: Config) -> Block:
    tables: dict[Part, Table] = {
        "mtp_projection": MTP_PROJECTION,
        "norm": {**MTP_NORMS, **LAYER_NORMS},
        "attention": attention_table(config),
        **MOE,
        "embedding": {name: COPIES[name] for name in config["mtp_copies"]},
    }
    return Block(mtp_prefix(config), tables, ROUTED_EXPERTS, is_mtp=True, recall=ATTENTION_RECALL)


def module_name(name: str, config: Config) -> str:
    prefix = mtp_prefix(config)
    if not name.startswith(prefix):
        return name
    below = name.removeprefix(prefix)
    return MODULE_NAMES.get(below, f"mtp.layers.0.{below}")


def normalise(config: Config) -> Config:
    """Make explicit what is left to a default; refuse what the table does not describe."""
    config = DEFAULTS | renamed(config, {"n_routed_experts": "num_experts"}) | {"mtp_copies": []}
    check_layers_and_experts(config)
    check_one_mtp_module(config)
    if config["n_group"] != 1:
        raise UserError(
            f"config.json: n_group {shown(config['n_group'])} is not supported: experts in groups would have to leave in "
            "equal numbers from each; no released glm4_moe has more than one group."
        )
    if config.get("head_dim") is None:
        config["head_dim"] = positive(config, "hidden_size") // positive(config, "num_attention_heads")
    shared = positive(config, "n_shared_experts") * positive(config, "moe_intermediate_size")
    return without_native_words(config) | {
        "shared_expert_intermediate_size": shared,
        "mlp_layer_types": mlp_layer_types(config),
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
    }


def mlp_layer_types(config: Config) -> list[str]:
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    if not isinstance(dense, int) or not 0 <= dense <= layers:
        raise UserError(
            f"config.json: 'first_k_dense_replace' must be a number of layers up to {layers}, is {shown(dense)}."
        )
    return ["dense"] * dense + ["sparse"] * (layers - dense)


def without_native_words(config: Config) -> Config:
    return {key: value for key, value in config.items() if key not in ("first_k_dense_replace", "n_shared_experts")}


def validate(config: Config) -> None:
    shared, routed = config["shared_expert_intermediate_size"], config["moe_intermediate_size"]
    if shared % routed:
        raise UserError(
            f"glm4_moe counts its shared experts in multiples of moe_intermediate_size {routed}, and "
            f"shared_expert_intermediate_size {shared} is none: choose {max(1, round(shared / routed)) * routed}."
        )
    kinds = config["mlp_layer_types"]
    if "dense" in kinds[kinds.count("dense") :]:
        raise UserError("the dense layers of a glm4_moe come before all others: keep layers in their order.")


def to_disk(config: Config) -> Config:
    kinds: list[str] = config["mlp_layer_types"]
    native: Config = {
        "first_k_dense_replace": kinds.count("dense"),
        "n_shared_experts": config["shared_expert_intermediate_size"] // config["moe_intermediate_size"],
    }
    ours = ("mlp_layer_types", "layer_types", "shared_expert_intermediate_size", "mtp_copies")
    config = {key: value for key, value in config.items() if key not in ours}
    return with_both_rope_forms(renamed(config, {"num_experts": "n_routed_experts"}), 0.5) | native


def serving_note(config: Config) -> str | None:
    number = config["num_hidden_layers"]
    if not config["num_nextn_predict_layers"] or number in (46, 92):
        return None
    return (
        f"the MTP module is layer {number}, where vLLM and SGLang read it; Transformers knows it as layers 46 and 92 only: "
        "it loads this model without, and reports the tensors of that layer as unexpected."
    )


def as_found(config: Config, names: Collection[str]) -> Config:
    """Correct the config where a checkpoint lacks the MTP layer that config.json announces, or in it the copies."""
    below = {name.removeprefix(mtp_prefix(config)) for name in names if name.startswith(mtp_prefix(config))}
    number = config["num_nextn_predict_layers"] if below else 0
    return {**config, "num_nextn_predict_layers": number, "mtp_copies": [name for name in MTP_COPIES if name in below]}


def mtp_names(config: Config, names: Collection[str]) -> set[str]:
    """Return every tensor of the layer behind the last, where it is an MTP module and not a decoder layer too many."""
    prefix = mtp_prefix(config)
    return {name for name in names if name.startswith(prefix)} if f"{prefix}eh_proj.weight" in names else set()


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    vocab=VOCAB,
    hidden=HIDDEN,
    expert=EXPERT,
    router="mlp.gate.weight",
    fields={
        **ATTENTION_FIELDS,
        "shared_expert_intermediate_size": (SHARED_NEURON,),
        "intermediate_size": (DENSE_NEURON,),
    },
    normalise=normalise,
    to_disk=to_disk,
    layer_blocks=layer_blocks,
    surroundings=surroundings,
    default_layout="per_expert",
    validate=validate,
    serving_note=serving_note,
    module_name=module_name,
    as_found=as_found,
    mtp_names=mtp_names,
    mtp_config={"num_hidden_layers": 1, "first_k_dense_replace": 0},
    router_scores="sigmoid",
    float32_tensors=("mlp.gate.weight",),
)
