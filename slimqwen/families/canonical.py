"""What several families' config.json have in common, made explicit; see `Family.normalise` and `Family.to_disk`."""

from collections.abc import Collection
from typing import Any

from slimqwen.errors import UserError
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
    """One full-attention layer after every full_attention_interval - 1 linear ones."""
    interval = config.get("full_attention_interval", 4)
    if not isinstance(interval, int) or interval <= 0:
        raise UserError(f"config.json: 'full_attention_interval' must be a positive whole number, is {interval!r}.")
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
        raise UserError(f"config.json: layer_types has {', '.join(unknown)}; known are {', '.join(known)}.")


def mlp_layer_types(config: Config) -> list[str]:
    """'dense' or 'sparse' per layer, from `mlp_only_layers` and `decoder_sparse_step` (Qwen's rule)."""
    only, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    if not isinstance(only, list) or not all(isinstance(layer, int) for layer in only):
        raise UserError(f"config.json: 'mlp_only_layers' must be a list of layer numbers, is {str(only)[:40]}.")
    if not isinstance(step, int) or step <= 0:
        raise UserError(f"config.json: 'decoder_sparse_step' must be a positive whole number, is {repr(step)[:40]}.")
    layers = range(config["num_hidden_layers"])
    return ["dense" if layer in only or (layer + 1) % step else "sparse" for layer in layers]


def with_mlp_only_layers(config: Config) -> Config:
    """`mlp_layer_types` back in Qwen's words."""
    kinds = config["mlp_layer_types"]
    new = {key: value for key, value in config.items() if key != "mlp_layer_types"}
    new["mlp_only_layers"] = [layer for layer, kind in enumerate(kinds) if kind == "dense"]
    return new | {"decoder_sparse_step": 1}


def with_both_rope_forms(config: Config, partial_rotary_factor: float | None = None) -> Config:
    """Transformers 5 writes `rope_parameters`, serving engines read the older keys too: have both (formats.md 1).

    `partial_rotary_factor` is the family's default; None where it rotates whole heads.
    """
    new = dict(config)
    rope: dict[str, Any] | None = config.get("rope_parameters")
    if rope:
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                new.setdefault(key, rope[key])
    elif "rope_theta" in config and not config.get("rope_scaling"):
        new["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        if partial_rotary_factor is not None:
            new["rope_parameters"]["partial_rotary_factor"] = config.get("partial_rotary_factor", partial_rotary_factor)
    return new
