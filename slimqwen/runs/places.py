"""Where a command may write: not among what it reads, and not around it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from slimqwen.builtin import checkpoint_folder
from slimqwen.core.errors import UserError
from slimqwen.data.packed import bin_path, idx_path
from slimqwen.recipe import DataRecipe, Recipe, Source


def check_apart(what: str, folder: Path, inputs: Mapping[str, Iterable[Path]]) -> None:
    """Raise UserError where `folder` lies in an input, is one, or holds one.

    A folder of text would hold more text once something is written into it, and the same command would find another
    input the next time; what lies among a command's own artefacts may be taken for one of them.

    Args:
        what: what the user calls the folder, "run_dir" or an option.
        inputs: what they are, "the data source" -> where.
    """
    out = folder.resolve()
    for kind, paths in inputs.items():
        for path in paths:
            place = path.resolve()
            if place == out or place in out.parents:
                raise UserError(
                    f"{what} {folder} lies in {kind} {path}, which is read here: choose a {what} outside of it."
                )
            if out in place.parents:
                raise UserError(f"{what} {folder} holds {kind} {path}, which is read here: choose another {what}.")


def inputs_of(recipe: Recipe) -> dict[str, list[Path]]:
    """Return what a recipe reads."""
    return {
        "the teacher": [checkpoint_folder(recipe.teacher)],
        **text_of(recipe.data),
        "the calibration source": list(recipe.calibration.sources.values()),
    }


def text_of(data: DataRecipe) -> dict[str, list[Path]]:
    """Return the text and token ids that are read."""
    return {
        "the data source": [path for source in data.sources for path in _paths(source)],
        "the held-out source": [path for source in data.heldout_sources for path in _paths(source)],
    }


def _paths(source: Source) -> list[Path]:
    if source.megatron is not None:
        return [bin_path(source.megatron), idx_path(source.megatron)]
    return [] if source.path is None else [source.path]
