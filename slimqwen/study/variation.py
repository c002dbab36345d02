"""Variations of a recipe: what an arm of a study changes, and nothing else."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.recipe import Recipe

Changes = Mapping[str, Any]
"""Dotted recipe keys -> values."""


@dataclass(frozen=True)
class Variation:
    """Arm of a study. `changes` may depend on the recipe and its teacher (a target with equally many parameters, say).

    trains: False measures the cut model only. paper: the paper's numbers for the same comparison, by column.
    """

    name: str
    title: str
    changes: Changes | Callable[[Recipe, Checkpoint], Changes]
    trains: bool = True
    paper: Mapping[str, float] = field(default_factory=dict)

    def changes_to(self, recipe: Recipe, teacher: Checkpoint) -> dict[str, Any]:
        """Return the changes to this recipe."""
        return dict(self.changes(recipe, teacher) if callable(self.changes) else self.changes)


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """Return `recipe` with other values at dotted keys, validated like a recipe read from a file.

    Raises UserError where they conflict with the rest of it.
    """
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        assert last in section, f"a recipe has no field {key}"
        section[last] = value
    try:
        return Recipe.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        said = ", ".join(f"{key}: {value}" for key, value in changes.items())
        raise UserError(f"the recipe cannot be varied by {said} ({error.errors()[0]['msg']}).") from error
