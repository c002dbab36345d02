"""What every part of a recipe is built on."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A group of recipe fields; unknown keys are refused, values are not mutated after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
