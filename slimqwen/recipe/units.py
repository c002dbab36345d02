"""Quantities with their units, as a recipe has them: "2B tokens", "500 steps", "30 min", "2GB"."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from slimqwen.core.bytesize import bytes_of
from slimqwen.core.errors import UserError
from slimqwen.recipe.section import MOST

Unit = Literal["steps", "tokens", "min"]

THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
UNITS: dict[str, tuple[Unit, float]] = {
    **dict.fromkeys(("step", "steps"), ("steps", 1)),
    **dict.fromkeys(("token", "tokens"), ("tokens", 1)),
    **dict.fromkeys(("s", "second", "seconds"), ("min", 1 / 60)),
    **dict.fromkeys(("min", "minute", "minutes"), ("min", 1)),
    **dict.fromkeys(("h", "hour", "hours"), ("min", 60)),
}
# Commas part thousands only: "2,5B" is no 25B, nor is it clear that it is 2.5B.
NUMBER = r"((?:\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)(?:\.\d+)?(?:[eE][+-]?\d+)?)"
COUNT = re.compile(rf"{NUMBER}\s*([KMBT]?)", re.ASCII)
DURATION = re.compile(rf"{NUMBER}\s*([KMBT]?)\s*([a-z]+)", re.ASCII)


class Duration:
    """A part of a training: so many optimiser steps, training tokens or minutes. Written and read as text, "500 steps"."""

    def __init__(self, amount: float, unit: Unit) -> None:
        self.amount, self.unit = amount, unit

    @classmethod
    def parse(cls, text: str) -> "Duration":
        """Read "500 steps", "2B tokens", "30 min" or "1.5 h". Raises ValueError for anything else."""
        found = DURATION.fullmatch(text.strip())
        unit, factor = UNITS.get(found[3], (None, 0.0)) if found else (None, 0.0)
        if found is None or unit is None:
            raise ValueError(f'write a duration as "500 steps", "2B tokens" or "30 min", not {_quoted(text)}')
        amount = _number(found[1]) * THOUSANDS[found[2]] * factor
        if not 0 <= amount <= MOST:
            raise ValueError(f"{_quoted(text)} is too long: at most {MOST:,} {unit}")
        if unit != "min":
            if amount != int(amount):
                raise ValueError(f"there is no part of a {unit[:-1]}: {_quoted(text)}")
            amount = int(amount)
        return cls(amount, unit)

    def __str__(self) -> str:
        return f"{self.amount} {self.unit}" if isinstance(self.amount, int) else f"{self.amount:.15g} {self.unit}"

    def __repr__(self) -> str:
        return f"Duration({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and (self.amount, self.unit) == (other.amount, other.unit)

    def __hash__(self) -> int:
        return hash((self.amount, self.unit))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate text (and durations themselves), and write text, in JSON as in Python."""

        def read(value: Any) -> Duration:
            if isinstance(value, Duration):
                return value
            if not isinstance(value, str):
                raise ValueError(
                    f'write a duration with its unit, as "500 steps", "2B tokens" or "30 min", not {value}'
                )
            return cls.parse(value)

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )


def in_units(*units: Unit, zero: bool = False) -> BeforeValidator:
    """Return a validator that takes durations in these units alone, and one of 0 where `zero` says so."""

    def check(value: Any) -> Any:
        duration = Duration.parse(value) if isinstance(value, str) else value
        if isinstance(duration, Duration):
            if duration.unit not in units:
                raise ValueError(f"must be in {' or '.join(units)}, is {duration}")
            if duration.amount == 0 and not zero:
                raise ValueError("must be more than 0")
        return duration

    return BeforeValidator(check)


def _quoted(text: str) -> str:
    return f'"{text}"' if len(text) <= 80 else f'"{text[:77]}..."'


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("_", ""))


def _count(value: Any) -> Any:
    """Read "400B" as a whole number; all else is left to the field's own type."""
    if not isinstance(value, str):
        return value
    found = COUNT.fullmatch(value.strip())
    number = _number(found[1]) * THOUSANDS[found[2]] if found else 0.5
    if number > MOST:
        raise ValueError(f"must be at most {MOST:,}, is {_quoted(value)}")
    if number != int(number):
        raise ValueError(f"must be a whole number, such as 8192, 2M or 400B, is {_quoted(value)}")
    return int(number)


def _bytes(value: Any) -> Any:
    """Read "2GB" as a number of bytes."""
    if not isinstance(value, str):
        return value
    try:
        return bytes_of(value)
    except UserError as error:
        raise ValueError(error.args[0].removesuffix(".")) from None


TokenCount = Annotated[int, Field(gt=0, le=MOST), BeforeValidator(_count)]
ByteCount = Annotated[int, Field(gt=0, le=MOST), BeforeValidator(_bytes)]
