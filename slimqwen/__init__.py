"""Compress a pretrained Mixture-of-Experts language model: prune depth, width and experts, then distil.

The stage functions are the library; the command line calls nothing else:

    tokenize -> calibrate -> plan -> prune -> distil -> evaluate -> report, and `run` for all of them by a recipe.

They are imported on first use, so that `import slimqwen` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimqwen.calibration.calibrate import calibrate as calibrate
    from slimqwen.data.tokenize import tokenize as tokenize
    from slimqwen.evaluation.evaluate import evaluate as evaluate
    from slimqwen.planning.plan import plan as plan
    from slimqwen.pruning.prune import prune as prune
    from slimqwen.recipe import CalibrationRecipe as CalibrationRecipe
    from slimqwen.recipe import DistilRecipe as DistilRecipe
    from slimqwen.recipe import EvaluationRecipe as EvaluationRecipe
    from slimqwen.recipe import Execution as Execution
    from slimqwen.recipe import PruningRecipe as PruningRecipe
    from slimqwen.recipe import Recipe as Recipe
    from slimqwen.recipe import Source as Source
    from slimqwen.recipe import Target as Target
    from slimqwen.recipe import TextSettings as TextSettings
    from slimqwen.recipe.file import load_recipe as load_recipe
    from slimqwen.reporting.report import report as report
    from slimqwen.runs.pretrain import pretrain as pretrain
    from slimqwen.runs.recipe_run import run as run
    from slimqwen.training.distil import distil as distil
    from slimqwen.training.inputs import TrainingInputs as TrainingInputs
    from slimqwen.training.metrics import StepLog as StepLog

_HOMES = {
    "CalibrationRecipe": "slimqwen.recipe",
    "DistilRecipe": "slimqwen.recipe",
    "EvaluationRecipe": "slimqwen.recipe",
    "Execution": "slimqwen.recipe",
    "PruningRecipe": "slimqwen.recipe",
    "Recipe": "slimqwen.recipe",
    "Source": "slimqwen.recipe",
    "StepLog": "slimqwen.training.metrics",
    "Target": "slimqwen.recipe",
    "TextSettings": "slimqwen.recipe",
    "TrainingInputs": "slimqwen.training.inputs",
    "calibrate": "slimqwen.calibration.calibrate",
    "distil": "slimqwen.training.distil",
    "evaluate": "slimqwen.evaluation.evaluate",
    "load_recipe": "slimqwen.recipe.file",
    "plan": "slimqwen.planning.plan",
    "pretrain": "slimqwen.runs.pretrain",
    "prune": "slimqwen.pruning.prune",
    "report": "slimqwen.reporting.report",
    "run": "slimqwen.runs.recipe_run",
    "tokenize": "slimqwen.data.tokenize",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slimqwen' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
