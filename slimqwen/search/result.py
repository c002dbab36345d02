"""search.json: measurements, predictions and the ranked shapes; and its tables as text."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slimqwen.artifacts import write_text
from slimqwen.core.terminal import DataTable
from slimqwen.recipe import PruningRecipe, Target
from slimqwen.shapes.counts import in_parameters
from slimqwen.shapes.fit import SEARCHED, Candidate, refused_by, why_refused

FOOTNOTE = (
    "KL(teacher || cut model) in nats per token on {tokens:,} held-out tokens, without training. predicted: the sum of each axis cut\n"
    "alone, interpolated between measured sizes. Measured shapes come first, the least KL first; the others follow by prediction.\n"
    "arithmetic: place of the shape among the {feasible:,} searched, without --tokens."
)


class Sensitivity(BaseModel):
    """Cut of one axis alone: its cost (`kl` beyond that of the base, nats per token) and the parameters that it saves."""

    model_config = ConfigDict(extra="forbid")

    field: str
    size: int
    kl: float
    total_saved: int
    active_saved: int


class Shape(BaseModel):
    """Shape that meets the budgets. `arithmetic_place`: its place in the ranking by arithmetic, from 1."""

    model_config = ConfigDict(extra="forbid")

    candidate: Candidate
    predicted_kl: float
    measured_kl: float | None
    arithmetic_place: int


class SearchResult(BaseModel):
    """Content of search.json. base: the sizes that are not searched, the same in all shapes. base_kl: the KL of that cut alone."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["slimqwen.search/1"] = "slimqwen.search/1"
    checkpoint: str
    budgets: str
    pruning: PruningRecipe
    measured_tokens: int
    base: Target
    base_kl: float
    sensitivities: list[Sensitivity]
    feasible: int
    shapes: list[Shape]
    agreeing_pairs: int
    pairs: int

    def save(self, path: Path) -> None:
        """Write search.json."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def tables(result: SearchResult) -> str:
    """Format the sensitivities and the shapes, best first, as text."""
    footnote = FOOTNOTE.format(tokens=result.measured_tokens, feasible=result.feasible)
    agreement = f"Prediction and measurement put {result.agreeing_pairs} of the {result.pairs} pairs of measured shapes in the same order."
    agreement += why_refused([shape.candidate for shape in result.shapes])
    return "\n\n".join((_sensitivities(result).as_text(160), _shapes(result).as_text(160), f"{footnote}\n{agreement}"))


def _sensitivities(result: SearchResult) -> DataTable:
    """Tabulate the cuts of one axis."""
    table = DataTable(
        "axis alone", "size", "KL", "total saved", "KL per million", "active saved", "KL per million", left=0
    )
    if result.base_kl:
        table.add("(pinned sizes)", "", f"{result.base_kl:.4f}", "", "", "", "")
    for cut in result.sensitivities:
        table.add(
            cut.field,
            str(cut.size),
            f"{cut.kl:.4f}",
            *_saved(cut.kl, cut.total_saved),
            *_saved(cut.kl, cut.active_saved),
        )
    return table


def _saved(kl: float, parameters: int) -> tuple[str, str]:
    """Format the parameters that a cut saves, and its KL per million of them."""
    return (in_parameters(parameters), f"{kl / parameters * 1e6:.2g}") if parameters else ("-", "-")


def _shapes(result: SearchResult) -> DataTable:
    """Tabulate the shapes, in their order."""
    refused = refused_by([shape.candidate for shape in result.shapes])
    table = DataTable(
        "",
        "layers",
        "hidden",
        "experts",
        "expert size",
        "top-k",
        "total",
        "active",
        "predicted KL",
        "measured KL",
        "arithmetic",
        *refused[:1],
        left=0,
    )
    for number, shape in enumerate(result.shapes, start=1):
        sizes = shape.candidate.target.model_dump()
        table.add(
            str(number),
            *(str(sizes[field]) for field in SEARCHED),
            in_parameters(shape.candidate.counts.total_parameters),
            in_parameters(shape.candidate.counts.active_parameters),
            f"{shape.predicted_kl:.4f}",
            "-" if shape.measured_kl is None else f"{shape.measured_kl:.4f}",
            str(shape.arithmetic_place),
            *refused[number : number + 1],
        )
    return table
