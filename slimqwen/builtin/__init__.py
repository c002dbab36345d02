"""Data shipped with the package: a small real teacher and the demo's recipe."""

import os
from pathlib import Path

from slimqwen.checkpoint.folder import snapshot_of
from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.recipe import BUILTIN_TEACHER

FOLDER = Path(__file__).parent
TEACHER = FOLDER / "teacher"
DEMO_RECIPE = FOLDER / "demo.yaml"


def checkpoint_folder(name: str) -> Path:
    """Return the folder of a checkpoint named in a recipe or command: a path, or 'builtin'."""
    if name == BUILTIN_TEACHER:
        return TEACHER
    folder = Path(os.path.expanduser(name))
    if name.lower().endswith(".gguf"):
        raise UserError(
            f"{name} is a GGUF file, and slimqwen reads safetensors only: give the original model's folder."
        )
    try:
        neighbours = [other.name for other in folder.parent.iterdir() if other.is_dir()]
    except OSError:
        neighbours = []
    if not folder.is_dir():
        what = "is a file, not" if folder.exists() else "is not"
        raise UserError(
            f"{name} {what} a checkpoint folder{did_you_mean(folder.name, [BUILTIN_TEACHER, *neighbours])}: give a folder with "
            "config.json and safetensors, or 'builtin'."
        )
    return snapshot_of(folder)
