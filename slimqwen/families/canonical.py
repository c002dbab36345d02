"""What several families' config.json have in common, made explicit; see `Family.normalise` and `Family.to_disk`."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

from slimqwen.core.errors import UserError, shown
from slimqwen.families.family import Config, positive

MOST_LAYERS = 10_000  # more is a damaged file


def check_layers_and_experts(config: Config) -> None:
    """Raise UserError where the sizes that are no axis, layers and top-k, are missing or contradict the experts."""
    if positive(config, "num_hidden_layers") > MOST_LAYERS:
        raise UserError(
            f"config.json: num_hidden_layers {config['num_hidden_layers']} is more than {MOST_LAYERS} layers."
        )
    if positive(config, "num_experts_per_tok") > positive(config, "num_experts"):
        raise UserError(
            f"config.json: num_experts_per_tok {config['num_experts_per_tok']} is more than num_experts {config['num_experts']}."
        )


def periodic_layer_types(config: Config) -> list[str]:
    """Return one full-attention layer after every full_attention_interval - 1 linear ones."""
    interval = config.get("full_attention_interval", 4)
    if not isinstance(interval, int) or interval <= 0:
        raise UserError(
            f"config.json: 'full_attention_interval' must be a positive whole number, is {shown(interval)}."
        )
    layers = range(config["num_hidden_layers"])
    return ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in layers]


def check_layer_types(config: Config, known: Collection[str]) -> None:
    """Raise UserError where layer_types is not one known word per layer."""
    kinds = config["layer_types"]
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise UserError("config.json: 'layer_types' must be a list of words, one per layer.")
    if len(kinds) != config["num_hidden_layers"]:
        raise UserError(
            f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers is {config['num_hidden_layers']}."
        )
    unknown = sorted({kind for kind in kinds if kind not in known})
    if unknown:
        raise UserError(f"config.json: layer_types has {shown(unknown)}; known are {', '.join(known)}.")


def full_attention_only(config: Config) -> Config:
    """Return the canonical words for a stack that attends in full everywhere and has neither biases nor an MTP module.

    Raises UserError where the config has them. Head sizes that files leave to a default are made explicit.
    """
    for key in ("attention_bias", "num_nextn_predict_layers"):
        if config.get(key):
            raise UserError(
                f"config.json: {key} {shown(config[key])} is not supported: no released {config['model_type']} has it."
            )
    config = config | {"num_nextn_predict_layers": 0}
    config.setdefault("tie_word_embeddings", False)
    heads = positive(config, "num_attention_heads")
    if config.get("head_dim") is None:
        config["head_dim"] = positive(config, "hidden_size") // heads
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    if config.get("layer_types") is None:
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    check_layer_types(config, ["full_attention"])
    return config


def without_full_attention_only(config: Config) -> Config:
    """Return the config less the words for what such a family always is, which its own config.json does not have."""
    return {key: value for key, value in config.items() if key not in ("layer_types", "num_nextn_predict_layers")}


def renamed(config: Config, names: Mapping[str, str]) -> Config:
    """Return the same config with some keys under another name, in their old place.

    Raises UserError where a key is there under both names with different values.
    """
    new: Config = {}
    for key, value in config.items():
        name = names.get(key, key)
        if new.setdefault(name, value) != value:
            given = " and ".join(key for key in config if names.get(key, key) == name)
            raise UserError(f"config.json: {given} are the same size and must agree.")
    return new


def full_attention_interval(config: Config) -> int | None:
    """Return n where every n-th layer attends in full and no other; None where the pattern is not regular."""
    full = [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    if full and full == list(range(full[0], len(config["layer_types"]), full[0] + 1)):
        return full[0] + 1
    return None


def with_full_attention_interval(config: Config) -> Config:
    """Add the interval of full attention, by which SGLang counts layers, wherever it is true of every layer."""
    new = {key: value for key, value in config.items() if key != "full_attention_interval"}
    interval = full_attention_interval(config)
    return new if interval is None else new | {"full_attention_interval": interval}


def check_one_mtp_module(config: Config) -> None:
    """Raise UserError unless there is one MTP module or none."""
    if config["num_nextn_predict_layers"] not in (0, 1):
        raise UserError(
            f"config.json: num_nextn_predict_layers is {shown(config['num_nextn_predict_layers'])}; supported is one MTP "
            "module (1), which is applied repeatedly, or none (0)."
        )


def with_mtp_layer_types(config: Config) -> Config:
    """Add what Transformers' own MtpModel needs where layers are of different types."""
    new = {key: value for key, value in config.items() if key not in ("num_mtp_layers", "mtp_layer_types")}
    number = config["num_nextn_predict_layers"]
    return new | {"num_mtp_layers": number, "mtp_layer_types": ["full_attention"] * number} if number else new


def mlp_layer_types(config: Config) -> list[str]:
    """Return 'dense' or 'sparse' per layer, from `mlp_only_layers` and `decoder_sparse_step` (Qwen's rule)."""
    only, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    if not isinstance(only, list) or not all(isinstance(layer, int) for layer in only):
        raise UserError(f"config.json: 'mlp_only_layers' must be a list of layer numbers, is {shown(only)}.")
    if not isinstance(step, int) or step <= 0:
        raise UserError(f"config.json: 'decoder_sparse_step' must be a positive whole number, is {shown(step)}.")
    layers = range(config["num_hidden_layers"])
    return ["dense" if layer in only or (layer + 1) % step else "sparse" for layer in layers]


def with_mlp_only_layers(config: Config) -> Config:
    """Put `mlp_layer_types` back into Qwen's words."""
    kinds = config["mlp_layer_types"]
    new = {key: value for key, value in config.items() if key != "mlp_layer_types"}
    new["mlp_only_layers"] = [layer for layer, kind in enumerate(kinds) if kind == "dense"]
    return new | {"decoder_sparse_step": 1}


def with_both_rope_forms(config: Config, partial_rotary_factor: float | None = None) -> Config:
    """Write RoPE in both forms: `rope_parameters` of Transformers 5, and the older keys that serving engines read too (formats.md 1).

    The older keys are `rope_theta`, `partial_rotary_factor` and, for YaRN and other kinds that stretch the context,
    `rope_scaling`; where it is there it counts before `rope_parameters`, as in Transformers. `partial_rotary_factor` is the
    family's default; None where it rotates whole heads.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            raise UserError(f"config.json: '{key}' must be a mapping, is {shown(config[key])}.")
    rope: dict[str, Any] = deepcopy(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if (not rope and config.get("rope_theta") is None) or any(isinstance(value, dict) for value in rope.values()):
        return dict(config)  # nothing to write twice, or RoPE by type of layer, for which there are no older keys
    kind = rope.setdefault("rope_type", rope.get("type") or "default")
    if config.get("rope_theta") is not None:
        rope.setdefault("rope_theta", config["rope_theta"])
    if partial_rotary_factor is not None:
        rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", partial_rotary_factor))
    new = config | {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    stretched = {"rope_scaling": {**scaling, "type": kind}} if kind != "default" else {}
    rope.pop("type", None)
    return new | {"rope_parameters": rope} | stretched
