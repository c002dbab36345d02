"""What every part of a recipe is built on: its groups of fields, and the numbers and paths that fields hold."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    model_validator,
)

MOST = 10**15  # of whatever is counted: no text has as many tokens, and the limit of 64 bits is far
SMALLEST, LARGEST = 1e-30, 1e30  # of a positive float: a ratio of two is finite in float64, and each is in float32
LARGEST_SEED = 2**63 - 1  # PyTorch's generators take no larger one

VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<braced>[^}]*)\}|(?P<bare>[A-Za-z_][A-Za-z0-9_]*))")


def _not_too_small(value: float) -> float:
    if 0.0 < value < SMALLEST:
        raise ValueError(f"{value:g} is too small to compute with: the smallest is {SMALLEST:g}")
    return value


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=LARGEST), AfterValidator(_not_too_small)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=LARGEST), AfterValidator(_not_too_small)]
SeedInt = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


def as_list(value: Any) -> Any:
    """Return a list as it is, and what is given alone as a list of one."""
    return value if isinstance(value, (list, tuple)) else [value]


def expanded(text: str) -> str:
    """Replace ~ and $VARIABLES in a path as a recipe has it; $$ is a dollar sign.

    Raises ValueError where a variable is not set, there is no such user, or no path can look so.
    """

    def value_of(found: re.Match[str]) -> str:
        if found["dollar"]:
            return "$"
        name = found["bare"] or found["braced"]
        if not os.environ.get(name):
            raise ValueError(f"the variable {name} is not set: set it, or write $$ for a dollar sign")
        return os.environ[name]

    first, slash, rest = text.partition("/") if text.startswith("~") else ("", "", text)
    home = os.path.expanduser(first)
    if home.startswith("~"):
        raise ValueError(f"there is no home folder {first}: write ./{text} for a folder of this name")
    path = home + slash + VARIABLE.sub(value_of, rest)
    if not path:
        raise ValueError("must not be empty")
    if "\0" in path:
        raise ValueError("a path cannot hold the character NUL")
    return path


def written(path: Path | str) -> str:
    """Write a path so that `expanded` gives it back."""
    text = str(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


def _from_file(value: Any, info: ValidationInfo) -> Any:
    """Expand what is read from a recipe's text; a path made by a program stays as it is."""
    return expanded(value) if info.mode == "json" and isinstance(value, str) else value


_READ, _WRITTEN = BeforeValidator(_from_file), PlainSerializer(written, return_type=str, when_used="json")
PathField = Annotated[Path, _READ, _WRITTEN]
CheckpointField = Annotated[str, _READ, _WRITTEN]  # a folder's path, or 'builtin'


class Section(BaseModel):
    """A group of recipe fields; unknown keys are refused, values are not mutated after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Tagged(Section):
    """A section that may be given as the value of its field `tag` alone: `optimizer: muon` is `optimizer: {kind: muon}`."""

    tag: ClassVar[str] = "kind"

    @model_validator(mode="before")
    @classmethod
    def _given_alone(cls, values: Any) -> Any:
        return {cls.tag: values} if isinstance(values, str) else values
