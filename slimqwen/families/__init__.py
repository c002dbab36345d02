"""The model families that are supported, by the `model_type` of their config.json."""

import difflib

from slimqwen.core.errors import UserError, did_you_mean, shown
from slimqwen.families.family import Config, Family
from slimqwen.families.glm4_moe import GLM4_MOE
from slimqwen.families.mixtral import MIXTRAL
from slimqwen.families.olmoe import OLMOE
from slimqwen.families.qwen3_5_moe import QWEN3_5_MOE, QWEN3_5_MOE_TEXT
from slimqwen.families.qwen3_moe import QWEN3_MOE
from slimqwen.families.qwen3_next import QWEN3_NEXT

__all__ = ["FAMILIES", "Config", "Family", "family_of"]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (QWEN3_NEXT, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_MOE, OLMOE, MIXTRAL, GLM4_MOE)
}


def family_of(config: Config, where: str) -> Family:
    """Return the family of a config.json. `where` names the file in the error for a family that is not supported."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type {shown(model_type)} is not supported{_meant(config)}; supported: {', '.join(FAMILIES)}. "
            "A new family is one table: see docs/adding-a-family.md."
        )
    return FAMILIES[model_type]


def _meant(config: Config) -> str:
    """Return a hint at what may be wrong with a model_type: another model's, or a misspelt word.

    A near word is no advice where the word is that of another architecture, whose tensors no other word makes fit.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and _is_known_to_transformers(model_type):
        return f" (it is another architecture{_nearest(model_type)})"
    named = config.get("architectures")
    by_architecture = {family.architecture: family.model_type for family in FAMILIES.values()}
    for architecture in named if isinstance(named, list) else []:
        if isinstance(architecture, str) and architecture in by_architecture:
            return f" (did you mean '{by_architecture[architecture]}', the model_type of its {architecture}?)"
    return did_you_mean(model_type, FAMILIES) if isinstance(model_type, str) else ""


def _is_known_to_transformers(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # only on the way to an error

    return model_type in CONFIG_MAPPING_NAMES


def _nearest(model_type: str) -> str:
    near = difflib.get_close_matches(model_type, list(FAMILIES), n=1, cutoff=0.6)
    return f", nearest to {near[0]}, whose tensors are not the same" if near else ""
