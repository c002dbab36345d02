"""The whole configuration of a run: strict, documented where it is declared, checked all at once.

A recipe is YAML. Every key is a field of a class here and every field has a description; unknown keys are errors with
a suggestion. `load_recipe` reads the file, applies `--set key=value` overrides and reports all problems together.
"""

from slimqwen.recipe.criteria import (
    DepthCriterion,
    DivergenceName,
    ExpertCompression,
    ExpertImportance,
    ExpertSimilarity,
    TrainedParts,
    WidthCriterion,
)
from slimqwen.recipe.data import BuiltinSource, DataRecipe, DocumentBoundaries, Source, TextFormat
from slimqwen.recipe.distil import (
    AUTO_REFERENCE,
    BalancingCounts,
    BatchSizeRamp,
    DistilRecipe,
    DivergenceRecipe,
    LossTerm,
    OptimizerName,
    OptimizerRecipe,
    Ramp,
    TeacherRecipe,
    TrainedPart,
)
from slimqwen.recipe.execution import BadSteps, Execution, LoggerName, Offload, OnBadStep
from slimqwen.recipe.pruning import (
    CalibrationRecipe,
    ExpertRecipe,
    HealingRecipe,
    PruningRecipe,
    Target,
)
from slimqwen.recipe.run import (
    BUILTIN_TEACHER,
    Baseline,
    DistilFile,
    EvaluationRecipe,
    PretrainRecipe,
    Recipe,
    Schedule,
    StageRecipe,
)
from slimqwen.recipe.section import Fraction, PositiveFloat, PositiveInt, Section
from slimqwen.recipe.text import Dtype, TextSettings
from slimqwen.recipe.units import ByteCount, Duration, TokenCount

__all__ = [
    "AUTO_REFERENCE",
    "BUILTIN_TEACHER",
    "BadSteps",
    "BalancingCounts",
    "Baseline",
    "BatchSizeRamp",
    "BuiltinSource",
    "ByteCount",
    "CalibrationRecipe",
    "DataRecipe",
    "DepthCriterion",
    "DistilFile",
    "DistilRecipe",
    "DivergenceName",
    "DivergenceRecipe",
    "DocumentBoundaries",
    "Dtype",
    "Duration",
    "EvaluationRecipe",
    "Execution",
    "ExpertCompression",
    "ExpertImportance",
    "ExpertRecipe",
    "ExpertSimilarity",
    "Fraction",
    "HealingRecipe",
    "LoggerName",
    "LossTerm",
    "Offload",
    "OnBadStep",
    "OptimizerName",
    "OptimizerRecipe",
    "PositiveFloat",
    "PositiveInt",
    "PretrainRecipe",
    "PruningRecipe",
    "Ramp",
    "Recipe",
    "Schedule",
    "Section",
    "Source",
    "StageRecipe",
    "Target",
    "TeacherRecipe",
    "TextFormat",
    "TextSettings",
    "TokenCount",
    "TrainedPart",
    "TrainedParts",
    "WidthCriterion",
]
