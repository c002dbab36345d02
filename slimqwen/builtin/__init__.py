"""What ships inside the package: a small real teacher and the demo's recipe."""

from pathlib import Path

from slimqwen.errors import UserError
from slimqwen.recipe import BUILTIN_TEACHER

FOLDER = Path(__file__).parent
TEACHER = FOLDER / "teacher"
DEMO_RECIPE = FOLDER / "demo.yaml"


def checkpoint_folder(name: str) -> Path:
    """The folder that a recipe's or a command's checkpoint names: a path, or 'builtin'."""
    if name == BUILTIN_TEACHER:
        return TEACHER
    if not Path(name).is_dir():
        raise UserError(
            f"{name} is not a checkpoint folder: give a folder with config.json and safetensors, or 'builtin'."
        )
    return Path(name)
