"""The built-in scales: recipes that studies vary."""

from collections.abc import Sequence
from pathlib import Path

from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.recipe import PretrainRecipe, Recipe
from slimqwen.recipe.file import load_recipe
from slimqwen.runs.pretrain import pretrain

FOLDER = Path(__file__).parent
SCALES = {"cpu": FOLDER / "cpu.yaml", "gpu": FOLDER / "gpu.yaml"}
TEACHERS = {"gpu": FOLDER / "gpu-teacher.yaml"}
"""Scales whose teacher is pretrained first, by these recipes, at the path that the scale's recipe names."""


def load_scale(scale: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe of a built-in scale or of a file. Raises UserError where `scale` is neither."""
    path = SCALES.get(scale, Path(scale))
    if scale not in SCALES and not path.is_file():
        raise UserError(
            f"--scale {scale}{did_you_mean(scale, SCALES)}: give one of {', '.join(SCALES)}, or the path of a recipe."
        )
    return load_recipe(path, overrides)


def pretrain_teacher(scale: str, recipe: Recipe) -> None:
    """Pretrain the teacher of a built-in scale, where `recipe` names it and it does not exist yet."""
    if scale in TEACHERS and not Path(recipe.teacher).is_dir():
        teacher = load_recipe(TEACHERS[scale], model=PretrainRecipe)
        if Path(recipe.teacher) == teacher.run_dir / "final":
            pretrain(teacher, command=f"slimqwen study --scale {scale}")
