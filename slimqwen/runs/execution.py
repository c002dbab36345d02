"""Which settings of a recipe are method, which change results, and which say only how the work is done."""

from dataclasses import dataclass
from typing import Any

from slimqwen.data.tokenize import FIELDS_WITHOUT_EFFECT
from slimqwen.recipe import (
    CalibrationRecipe,
    DataRecipe,
    DistilRecipe,
    EvaluationRecipe,
    PretrainRecipe,
    Recipe,
    Section,
    TeacherCacheRecipe,
)
from slimqwen.training.distil import SETTINGS_WITHOUT_EFFECT

EXECUTION_FIELDS: dict[type[Section], set[str]] = {
    CalibrationRecipe: {"batch_size", "streaming", "memory_budget_bytes"},
    DataRecipe: FIELDS_WITHOUT_EFFECT,
    DistilRecipe: SETTINGS_WITHOUT_EFFECT,
    EvaluationRecipe: {"batch_size"},
    TeacherCacheRecipe: {"batch_size", "shard_bytes", "streaming", "memory_budget_bytes"},
}


@dataclass(frozen=True)
class Execution:
    """Settings that change speed or memory, and no result beyond rounding."""

    device: str
    batch_size: int
    memory_budget: int
    workers: int | None

    @classmethod
    def of(cls, recipe: Recipe | PretrainRecipe) -> "Execution":
        """Return the execution settings of a recipe."""
        calibration = recipe.calibration if isinstance(recipe, Recipe) else Recipe.model_fields["calibration"].default
        return cls(recipe.device, calibration.batch_size, calibration.memory_budget_bytes, recipe.data.workers)


def method_of(section: Section) -> dict[str, Any]:
    """Return the settings of a section that results depend on, as JSON."""
    return section.model_dump(mode="json", exclude=EXECUTION_FIELDS.get(type(section)))
