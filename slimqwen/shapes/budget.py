"""The argument of `slimqwen plan fit` and `plan search`: budgets to meet and pinned sizes."""

import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from slimqwen.core.bytesize import bytes_of
from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.recipe import Target

QUANTITIES = ("total", "active", "active_without_input_embedding", "checkpoint")
PARAMETER_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

TOLERANCE = 0.03


@dataclass(frozen=True)
class Budget:
    """A requested amount of one of QUANTITIES, and the range that meets it.

    Parameters: within TOLERANCE, or anything that rounds to the amount as written, as in model names: "2B" is 1.5B to
    2.5B, "2.0B" 1.94B to 2.06B. Bytes are a limit of a disk or device: within TOLERANCE below, never above.
    """

    quantity: str
    written: str
    amount: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.quantity}={self.written}"

    def met_by(self, number: Any) -> Any:
        """Return whether a number meets the budget; elementwise for an array."""
        return (self.lowest <= number) & (number <= self.highest)


def parse(wanted: str) -> tuple[list[Budget], Target]:
    """Parse budgets and pinned sizes, such as "total=23B,checkpoint=40GB,num_hidden_layers=36". Raises UserError."""
    budgets: list[Budget] = []
    pinned: dict[str, str] = {}
    known = (*QUANTITIES, *Target.model_fields)
    for item in wanted.split(","):
        name, equals, value = (text.strip() for text in item.partition("="))
        if name not in known:
            raise UserError(
                f"budgets: {name!r} is not known{did_you_mean(name, known)}; budgets are {', '.join(QUANTITIES)}, and any "
                f"size can be pinned ({', '.join(Target.model_fields)})."
            )
        if not equals or name in pinned or name in [budget.quantity for budget in budgets]:
            raise UserError(f"budgets: {name} must be given once, with a value: {name}=...")
        if name in QUANTITIES:
            budgets.append(_budget(name, value))
        else:
            pinned[name] = value
    if not budgets:
        raise UserError(f"a shape needs a budget: one or more of {', '.join(QUANTITIES)}, e.g. total=23B,active=2B.")
    try:
        return budgets, Target.model_validate_strings(pinned)
    except ValidationError as error:
        field = error.errors()[0]["loc"][0]
        raise UserError(f"budgets: {field} must be a positive whole number, is {pinned[str(field)]!r}.") from None


def _budget(quantity: str, written: str) -> Budget:
    if quantity == "checkpoint":
        room = bytes_of(written)
        return Budget(quantity, written, room, room * (1 - TOLERANCE), room)
    match = re.fullmatch(r"(\d{1,15}(?:\.(\d{1,15}))?)\s*([a-z]?)", written, re.IGNORECASE)
    unit = PARAMETER_UNITS.get(match[3].upper()) if match else None
    if match is None or unit is None or float(match[1]) == 0:
        units = ", ".join(filter(None, PARAMETER_UNITS))
        raise UserError(f"budgets: {quantity}={written!r} must be a number and one of {units}, e.g. 23B.")
    amount = float(match[1]) * unit
    margin = max(amount * TOLERANCE, unit * 0.5 * 10 ** -len(match[2] or ""))
    return Budget(quantity, written, amount, amount - margin, amount + margin)
