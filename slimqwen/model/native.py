"""The border to Transformers: its config and its modules, made from ours; whatever it raises becomes one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from slimqwen.checkpoint.config import sections
from slimqwen.core.errors import UserError
from slimqwen.core.warning import warn
from slimqwen.families import Config, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NOISE = ("attention_dropout", "router_jitter_noise")
"""What a config makes random in training and nowhere else. Transformers draws it from a generator that nothing seeds."""

LONGEST_REASON = 300


@contextmanager
def refusals_explained(where: str) -> Iterator[None]:
    """Turn what Transformers raises about a config, of any class, into one sentence that begins with `where`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any class: it is the library's verdict
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, LookupError | AttributeError):  # whose words alone are a name
            reason = f"{type(error).__name__} {reason}"
        raise UserError(
            f"{where}: Transformers does not accept config.json: {reason[:LONGEST_REASON].rstrip('.')}."
        ) from error


def native_config(on_disk: Config, where: str) -> "PretrainedConfig":
    """Build Transformers' config of a config.json, from a copy: Transformers writes into the mappings that it is given.

    It checks the type of every field that it knows. Raises UserError where it does not accept one; `where` names the file.
    """
    with refusals_explained(where):
        return AutoConfig.for_model(**deepcopy(on_disk))


def computed_config(family: Family, config: Config, where: str) -> "PretrainedConfig":
    """Build the `native_config` of a canonical config, for computing: without noise."""
    on_disk: Config = deepcopy(family.to_disk(config))
    for section in sections(on_disk):
        section.update(dict.fromkeys(noise_of(section), 0.0))
    return native_config(on_disk, where)


def build_backbone(family: Family, config: Config, dtype: torch.dtype, where: str) -> "PreTrainedModel":
    """Build the modules of a causal language model of a canonical config, parameters in `dtype`, on the device that is current.

    Raises UserError for what Transformers does not accept: a field's type, and what only building shows (an unknown
    activation, a kind of RoPE, RoPE of more dims than a head has).
    """
    from transformers import AutoModelForCausalLM  # 110 MB, which `prune` must not take

    native = computed_config(family, config, where)
    with refusals_explained(where):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(native, dtype=dtype)
    rotated = 2 * model.get_decoder().rotary_emb.inv_freq.numel()
    if rotated > config["head_dim"]:  # neither a field's type nor a module's shape shows it
        raise UserError(
            f"{where}: RoPE turns {rotated} dims of heads that have {config['head_dim']}: lower partial_rotary_factor in config.json."
        )
    return model


def check_buildable(family: Family, config: Config, where: str) -> None:
    """Raise UserError where Transformers cannot build the model of a canonical config. Takes no memory for weights."""
    with torch.device("meta"):
        build_backbone(family, config, torch.float32, where)


def announce_noise(config: Config) -> None:
    """Say what of a config is left out in training."""
    found = noise_of(config)
    if found:
        words = ", ".join(f"{key} {value}" for key, value in found.items())
        warn(
            f"note: config.json has {words}, noise in training, which slimqwen trains without; it stays in the config that "
            "is written."
        )


def noise_of(config: Config) -> dict[str, Any]:
    """Return the noise that a config has."""
    return {key: config[key] for key in NOISE if isinstance(config.get(key), int | float) and config[key]}
