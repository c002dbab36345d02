"""Qwen3.5-MoE (Qwen3.5-35B-A3B and kin): Qwen3-Next's layers with DeltaNet's projections apart and no dense layers.

The text model by itself is one family, the released vision-language model another: its language model is the same one
below another prefix, and its vision tower is carried along. Names and shapes as in Transformers' `Qwen3_5MoeForCausalLM`
and `Qwen3_5MoeForConditionalGeneration`.
"""

from collections.abc import Collection
from functools import partial

from slimqwen.core.errors import UserError, shown
from slimqwen.families.axes import Term, cat
from slimqwen.families.canonical import (
    MOST_LAYERS,
    check_layers_and_experts,
    check_one_mtp_module,
    with_full_attention_interval,
    with_mtp_layer_types,
)
from slimqwen.families.family import Block, Config, Family, Table, positive
from slimqwen.families.qwen3_next import (
    DELTANET_CORE,
    DELTANET_RECALL,
    FIELDS,
    FLOAT32_TENSORS,
    KEYS,
    MIXERS,
    VALUE_HEADS,
    VALUES,
    Mixers,
    check_no_biases,
    layer_blocks,
    layer_types,
    serving_note,
    surroundings,
    without_absent_mtp,
)
from slimqwen.families.tables import EXPERT, HIDDEN, MIXER_INPUT, VOCAB

DELTANET: Table = {
    "linear_attn.in_proj_qkv.weight": (
        cat(q=KEYS, k=KEYS, v=VALUES),
        MIXER_INPUT,
    ),  # not interleaved, unlike Qwen3-Next's
    "linear_attn.in_proj_z.weight": (VALUES, MIXER_INPUT),
    "linear_attn.in_proj_b.weight": (VALUE_HEADS, MIXER_INPUT),
    "linear_attn.in_proj_a.weight": (VALUE_HEADS, MIXER_INPUT),
    **DELTANET_CORE,
}
HEAD = "lm_head.weight"
QWEN3_5_MIXERS: Mixers = {**MIXERS, "linear_attention": ("deltanet", DELTANET, DELTANET_RECALL)}

# --- the text model ---------------------------------------------------------------------------------------------------


def normalise(config: Config) -> Config:
    """Make explicit what is left to a default; refuse what the table does not describe."""
    released: Config = {
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": config.get("mtp_num_hidden_layers", 1),
    }
    config = released | config
    check_layers_and_experts(config)
    check_one_mtp_module(config)
    check_no_biases(config)
    config["layer_types"] = layer_types(config)
    config["mlp_layer_types"] = ["sparse"] * config["num_hidden_layers"]
    return config


def to_disk(config: Config) -> Config:
    """Write the number of MTP modules in the release's word, which vLLM's qwen3_5_mtp reads, and in Transformers'."""
    config = with_mtp_layer_types(with_full_attention_interval(config))
    config["mtp_num_hidden_layers"] = config.pop("num_nextn_predict_layers")
    del config["mlp_layer_types"]
    return {key: value for key, value in config.items() if key != "text_is_tied"}


def as_found(config: Config, names: Collection[str]) -> Config:
    """Correct the config for a module or a head that is not stored, and for a head that config.json ties within the wrapper only.

    Transformers' text model goes by the inner word, and by the outer one its wrapper, which writes false unasked.
    """
    config = without_absent_mtp(config, names)
    return config | {"tie_word_embeddings": True} if config.get("text_is_tied") and HEAD not in names else config


# --- the vision-language model ----------------------------------------------------------------------------------------

LANGUAGE_MODEL = "model.language_model."
HOISTED = ("architectures", "model_type", "dtype", "tie_word_embeddings")  # of the whole, before the text model's own
VISION_SIZES = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "in_channels",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "num_position_embeddings",
    "out_hidden_size",
)


def unwrapped(config: Config) -> Config:
    """Return the text model's canonical config; `wrapper` keeps the rest of config.json, the vision tower's above all."""
    for section in ("text_config", "vision_config"):
        is_optional = section == "vision_config" and config.get(section) is None
        if not isinstance(config.get(section), dict) and not is_optional:
            raise UserError(
                f"config.json: '{section}' must be a mapping, as in every {config['model_type']} config.json; a text model "
                "without a vision tower is a qwen3_5_moe_text."
            )
    hoisted = {key: config[key] for key in HOISTED if key in config}
    text = normalise(
        config["text_config"] | hoisted | {"text_is_tied": config["text_config"].get("tie_word_embeddings")}
    )
    if config.get("vision_config") is not None:
        check_vision(config["vision_config"], text)
    return text | {"wrapper": {key: value for key, value in config.items() if key not in ("text_config", *HOISTED)}}


def check_vision(vision: Config, text: Config) -> None:
    """Raise UserError for a tower whose tensors cannot be sized, or which does not fit the residual stream."""
    sizes = {f"vision_config.{key}": vision.get(key) for key in VISION_SIZES}
    for key in sizes:
        positive(sizes, key)
    if vision["depth"] > MOST_LAYERS:
        raise UserError(f"config.json: vision_config.depth {vision['depth']} is more than {MOST_LAYERS} layers.")
    if vision["out_hidden_size"] != text.get("hidden_size"):
        raise UserError(
            f"config.json: vision_config.out_hidden_size {vision['out_hidden_size']} is not text_config.hidden_size "
            f"{shown(text.get('hidden_size'))}, the residual stream that the vision tower writes into."
        )


def wrapped(config: Config) -> Config:
    text = to_disk({key: value for key, value in config.items() if key != "wrapper"})
    outer = {key: text[key] for key in HOISTED if key in text}
    text["model_type"] = "qwen3_5_moe_text"
    text.pop("architectures", None)
    wrapper: Config = config["wrapper"]
    new = wrapper | outer | {"text_config": text}
    vision = wrapper.get("vision_config")
    return new if vision is None else new | {"vision_config": vision | {"out_hidden_size": config["hidden_size"]}}


def vision_tower(config: Config) -> Block:
    """Return its tensors, whose sizes are fixed but one: the rows of the merger's last projection are written into the residual stream."""
    vision = config["wrapper"].get("vision_config")
    if vision is None:
        return Block("model.visual.", {})
    width, patch = vision["hidden_size"], vision["patch_size"]
    table: dict[str, tuple[Term, ...]] = {
        "patch_embed.proj.weight": (width, vision["in_channels"], vision["temporal_patch_size"], patch, patch),
        "patch_embed.proj.bias": (width,),
        "pos_embed.weight": (vision["num_position_embeddings"], width),
    }
    for layer in range(vision["depth"]):
        table |= _norm(f"blocks.{layer}.norm1", width) | _norm(f"blocks.{layer}.norm2", width)
        table |= _linear(f"blocks.{layer}.attn.qkv", 3 * width, width)
        table |= _linear(f"blocks.{layer}.attn.proj", width, width)
        table |= _linear(f"blocks.{layer}.mlp.linear_fc1", vision["intermediate_size"], width)
        table |= _linear(f"blocks.{layer}.mlp.linear_fc2", width, vision["intermediate_size"])
    merged = width * vision["spatial_merge_size"] ** 2
    table |= _norm("merger.norm", width) | _linear("merger.linear_fc1", merged, merged)
    table |= _linear("merger.linear_fc2", HIDDEN, merged)
    return Block("model.visual.", {"vision": table})


def _linear(name: str, rows: Term, columns: Term) -> dict[str, tuple[Term, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> dict[str, tuple[Term, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def wrapped_surroundings(config: Config) -> list[Block]:
    return [*surroundings(config, LANGUAGE_MODEL), vision_tower(config)]


def language_model(config: Config) -> tuple[Family, Config]:
    """Return the text model of a wrapper's canonical config."""
    text = {key: value for key, value in config.items() if key not in ("wrapper", "architectures")}
    own = {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]}
    return QWEN3_5_MOE_TEXT, text | own


def module_name(name: str, config: Config) -> str:
    """Take the prefix off, as AutoModelForCausalLM does, which loads the language model alone."""
    return "model." + name.removeprefix(LANGUAGE_MODEL) if name.startswith(LANGUAGE_MODEL) else name


# Less the dense layers, of which there are none.
TEXT_FIELDS = {field: axes for field, axes in FIELDS.items() if field != "intermediate_size"}
MTP_CONFIG = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}

QWEN3_5_MOE_TEXT = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    vocab=VOCAB,
    hidden=HIDDEN,
    expert=EXPERT,
    router="mlp.gate.weight",
    float32_tensors=FLOAT32_TENSORS,
    norm_offset=1.0,
    fields=TEXT_FIELDS,
    normalise=normalise,
    to_disk=to_disk,
    layer_blocks=partial(layer_blocks, mixers=QWEN3_5_MIXERS),
    surroundings=surroundings,
    serving_note=serving_note,
    as_found=as_found,
    mtp_config=MTP_CONFIG,
    default_layout="fused",
)

QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe",
    architecture="Qwen3_5MoeForConditionalGeneration",
    vocab=VOCAB,
    hidden=HIDDEN,
    expert=EXPERT,
    router="mlp.gate.weight",
    float32_tensors=FLOAT32_TENSORS,
    norm_offset=1.0,
    fields=TEXT_FIELDS,
    normalise=unwrapped,
    to_disk=wrapped,
    layer_blocks=partial(layer_blocks, mixers=QWEN3_5_MIXERS, root=LANGUAGE_MODEL),
    surroundings=wrapped_surroundings,
    serving_note=serving_note,
    module_name=module_name,
    language_model=language_model,
    as_found=as_found,
    mtp_config=MTP_CONFIG,
    default_layout="fused",
)
