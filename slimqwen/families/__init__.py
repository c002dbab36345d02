"""The model families that slimqwen knows, by the `model_type` of their config.json."""

from slimqwen.errors import UserError, did_you_mean, shown
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
    """The family of a config.json. `where` names the file in the error for a family that is not supported."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        hint = did_you_mean(str(model_type), FAMILIES)
        raise UserError(
            f"{where}: model_type {shown(model_type)} is not supported{hint}; supported: {', '.join(FAMILIES)}. "
            "A new family is one table: see docs/adding-a-family.md."
        )
    return FAMILIES[model_type]
