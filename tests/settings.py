"""Settings by name, each in the section of a recipe that has it."""

from typing import Any

from slimqwen.recipe import Execution, PruningRecipe, Section


def sections(section: type[Section], values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments `recipe`, a `section`, and `execution`, which has the values that `section` has not; on a CPU."""
    own = {name: value for name, value in values.items() if name in section.model_fields}
    others = {name: value for name, value in values.items() if name not in own}
    return {"recipe": section.model_validate(own), "execution": Execution.model_validate({"device": "cpu"} | others)}


def paper(**changes: Any) -> PruningRecipe:
    """Return the paper's criteria but for `changes`."""
    return PruningRecipe.model_validate({**dict(PruningRecipe().as_published()), **changes})
