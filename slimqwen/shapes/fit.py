"""Shapes that meet a budget: `slimqwen plan fit CONFIG total=23B,active=2B`. No weights, no torch.

Every shape of a grid is counted (`families.count.tally` is vectorised), and those within the budgets are ranked.
Sizes that are neither searched nor pinned stay the source's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from slimqwen.artifacts import TEXT_MARK, write_text
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.errors import UserError
from slimqwen.core.terminal import DataTable
from slimqwen.families import Config, Family
from slimqwen.families.axes import Axis
from slimqwen.families.count import Counts, count, tally
from slimqwen.recipe import Target
from slimqwen.serving.loadable import Refusal, loadable, refusals_in_words
from slimqwen.shapes.budget import QUANTITIES, Budget, parse
from slimqwen.shapes.counts import in_parameters
from slimqwen.shapes.footprint import BYTES_OF, dtype_of
from slimqwen.shapes.target import completed, target_config

Array = NDArray[Any]

SEARCHED = ("num_hidden_layers", "hidden_size", "num_experts", "moe_intermediate_size", "num_experts_per_tok")
EXPERTS_MULTIPLE = 8  # experts divide evenly over 1, 2, 4 and 8 expert-parallel ranks
UNEVEN_EXPERTS = 0.05  # added to a shape's distance if its experts do not divide over 16 ranks, and again over 32

# The paper's two cuts (method.md section 1), after / before in the order of SEARCHED.
PAPER_CUTS = ((36 / 48, 1536 / 2048, 256 / 512, 1.0, 8 / 10), (20 / 28, 1280 / 2048, 128 / 256, 1.0, 8 / 8))

FOOTNOTE = (
    "A budget of parameters is met within 3 %, or by what rounds to it as written (2B: 1.5B to 2.5B; 2.0B: 1.94B to 2.06B); "
    "bytes are\nnever exceeded. Whole blocks of layers first; then by distance: how far the sizes are from the paper's "
    "proportions and the\nnumbers from the budgets (0.1: about 10 % off in one of them). active: with input embedding{mtp}."
)


@dataclass(frozen=True)
class Grid:
    """All shapes that are searched: `shapes` [n, SEARCHED], `quantities` name -> [n]; `source` [SEARCHED]."""

    shapes: Array
    source: Array
    quantities: dict[str, Array]

    def describe(self, index: int, quantities: Sequence[str]) -> str:
        """Describe one shape: the given quantities, then its sizes."""
        numbers = [
            f"{name} {self.quantities[name][index]:,}" + " bytes" * (name == "checkpoint") for name in quantities
        ]
        shape = ", ".join(f"{field} {size}" for field, size in zip(SEARCHED, self.shapes[index], strict=True))
        return f"{', '.join(numbers)} ({shape})"


class Candidate(BaseModel):
    """A shape that meets the budgets.

    `deviations`: quantity -> actual / budget - 1; `distance`: see `distances`; `refusals`: the engines that would not load it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Target
    counts: Counts
    checkpoint_bytes: int
    deviations: dict[str, float]
    distance: float
    refusals: list[Refusal] = []


@dataclass(frozen=True)
class Feasible:
    """All shapes that meet the budgets, ranked: whole periods of layers first, then by `distances`.

    `shapes` [n, SEARCHED], `distance` [n], `is_whole` [n] (whole periods of layer_types), `checkpoint_bytes` [n],
    `deviations`: quantity -> actual / budget - 1, [n]. `pinned`: the sizes common to all.
    """

    family: Family
    config: Config
    pinned: Target
    shapes: Array
    distance: Array
    is_whole: Array
    checkpoint_bytes: Array
    deviations: dict[str, Array]

    def of_whole_blocks(self) -> "Feasible":
        """Keep only the shapes of whole periods of layers, where there are any."""
        if not self.is_whole.any():
            return self
        kept = self.is_whole
        return replace(
            self,
            shapes=self.shapes[kept],
            distance=self.distance[kept],
            is_whole=kept[kept],
            checkpoint_bytes=self.checkpoint_bytes[kept],
            deviations={quantity: values[kept] for quantity, values in self.deviations.items()},
        )

    def candidates(self, order: Iterable[int], limit: int) -> dict[int, Candidate]:
        """Count the first `limit` of the shapes in `order` (indices). Raises UserError where there is none.

        A family may refuse a combination of sizes that are valid one by one: such shapes are left out.
        """
        counted: dict[int, Candidate] = {}
        for index in order:
            sizes = dict(zip(SEARCHED, self.shapes[index].tolist(), strict=True))
            target = self.pinned.model_copy(update=sizes)
            try:
                config = target_config(self.family, self.config, completed(self.family, target, self.config))
            except UserError:
                continue
            layers = list(range(config["num_hidden_layers"]))
            counted[int(index)] = Candidate(
                target=target,
                refusals=loadable(self.family, self.config, config, layers=layers).refusals,
                counts=count(self.family, config),
                checkpoint_bytes=int(self.checkpoint_bytes[index]),
                deviations={quantity: float(values[index]) for quantity, values in self.deviations.items()},
                distance=float(self.distance[index]),
            )
            if len(counted) == limit:
                break
        if not counted:
            raise UserError(
                f"{self.family.model_type} refuses every shape within the budgets: change a budget or a pinned size."
            )
        return counted


def fit(family: Family, config: Config, wanted: str, *, align: int = 128, limit: int = 10) -> list[Candidate]:
    """Find the `limit` best shapes for `wanted`: budgets and pinned sizes such as "total=23B,active=2B,hidden_size=1536".

    Shapes of whole periods of layer_types (3:1 blocks) come first, each kind by `distances`. Raises UserError
    where `wanted` cannot be parsed, for a budget outside the range of the grid, and where no shape meets all budgets.
    """
    found = feasible(family, config, wanted, align=align)
    return list(found.candidates(range(len(found.shapes)), limit).values())


def feasible(family: Family, config: Config, wanted: str, *, align: int = 128) -> Feasible:
    """Find all shapes that meet the budgets, ranked as in `fit`. Raises UserError likewise."""
    budgets, pinned = parse(wanted)
    grid = count_grid(family, config, pinned, align)
    for budget in budgets:
        check_reachable(budget, grid)
    off = np.stack([np.log(grid.quantities[budget.quantity] / budget.amount) for budget in budgets])  # [budgets, n]
    meets = np.all([budget.met_by(grid.quantities[budget.quantity]) for budget in budgets], axis=0)
    if not meets.any():
        nearest = grid.describe(int((off**2).sum(axis=0).argmin()), [budget.quantity for budget in budgets])
        raise UserError(
            f"no shape meets {wanted}; the nearest has {nearest}: change a budget or a pinned size, or lower --align."
        )
    distance = distances(grid.shapes[meets], grid.source, off[:, meets])
    is_whole = grid.shapes[meets, 0] % period(config["layer_types"]) == 0
    order = np.lexsort((distance, ~is_whole))
    kept = np.flatnonzero(meets)[order]
    return Feasible(
        family=family,
        config=config,
        pinned=pinned,
        shapes=grid.shapes[kept],
        distance=distance[order],
        is_whole=is_whole[order],
        checkpoint_bytes=grid.quantities["checkpoint"][kept],
        deviations={b.quantity: grid.quantities[b.quantity][kept] / b.amount - 1 for b in budgets},
    )


def count_grid(family: Family, config: Config, pinned: Target, align: int) -> Grid:
    """Count every shape that can be cut from `config` with the pinned sizes.

    Layers: any number of the first, including at least one with full attention and one with experts. Hidden and expert
    size: multiples of `align`. Experts: multiples of EXPERTS_MULTIPLE. Top-k: from half of the source's. The source's own
    size is always included. Raises UserError for pinned sizes that cannot be cut from the source.
    """
    fixed = pinned.model_dump(exclude_none=True)
    base = completed(family, Target(**({"num_experts_per_tok": 1} | fixed)), config)
    choices = _choices(config, align) | {field: [fixed[field]] for field in SEARCHED if field in fixed}
    layer_choices, *others = (np.array(choices[field], dtype=np.int64) for field in SEARCHED)
    others[-1] = np.unique(np.minimum(others[-1], others[1].max()))  # top-k is at most the number of experts
    hidden, experts, neurons, chosen = np.ix_(
        *others
    )  # one dimension each, broadcast only where the table multiplies them
    possible = np.broadcast_to(chosen <= experts, [len(values) for values in others])

    shapes: list[Array] = []
    quantities: dict[str, list[Array]] = {name: [] for name in QUANTITIES}
    for layers in layer_choices.tolist():
        cut = target_config(family, config, base.model_copy(update={"num_hidden_layers": layers}))
        sizes: dict[Axis, Any] = {**family.sizes(cut)}
        for field, values in (("hidden_size", hidden), ("num_experts", experts), ("moe_intermediate_size", neurons)):
            sizes[family.fields[field][-1]] = values
        counts = tally(family, cut, sizes, chosen)
        stored = (counts["total_parameters"] + counts["mtp_parameters"]) * BYTES_OF[dtype_of(config)]
        for name, numbers in (
            ("total", counts["total_parameters"]),
            ("active", counts["active_parameters"]),
            ("active_without_input_embedding", counts["active_without_input_embedding"]),
            ("checkpoint", stored),
        ):
            quantities[name].append(np.broadcast_to(numbers, possible.shape)[possible])
        columns = [np.broadcast_to(values, possible.shape)[possible] for values in (hidden, experts, neurons, chosen)]
        shapes.append(np.stack([np.full_like(columns[0], layers), *columns], axis=1))
    return Grid(
        shapes=np.concatenate(shapes),
        source=np.array([config[field] for field in SEARCHED]),
        quantities={name: np.concatenate(pieces) for name, pieces in quantities.items()},
    )


def check_reachable(budget: Budget, grid: Grid) -> None:
    """Raise UserError for a budget below the smallest shape of the grid, or above the largest."""
    numbers = grid.quantities[budget.quantity]
    if numbers.min() > budget.highest:
        raise UserError(
            f"{budget} can't be reached: the smallest shape has "
            f"{grid.describe(int(numbers.argmin()), [budget.quantity])}; pin a size to go below it, or lower --align."
        )
    if numbers.max() < budget.lowest:
        raise UserError(
            f"{budget} is out of reach: the largest shape has "
            f"{grid.describe(int(numbers.argmax()), [budget.quantity])}."
        )


def distances(shapes: Array, source: Array, off: Array) -> Array:
    """Return the distances of shapes [n, SEARCHED] from the paper's proportions and from the budgets, [n]; 0 is best.

    A cut is the vector of log(before / after) of the sizes. The reference for a shape is one of PAPER_CUTS, scaled so that
    its cuts of layers, hidden, experts and expert size have the same sum as the shape's. The distance is Euclidean, to
    the nearer reference, with `off` [budgets, n], log(actual / budget), as further coordinates. 0.1 is about 10 % off
    in one size. UNEVEN_EXPERTS is added.
    """
    cuts = np.log(source / shapes)  # [n, SEARCHED]
    together = cuts[:, :4].sum(axis=1, keepdims=True)
    paper = -np.log(np.array(PAPER_CUTS))
    paper /= paper[:, :4].sum(axis=1, keepdims=True)
    squared = np.min([((cuts - together * share) ** 2).sum(axis=1) for share in paper], axis=0)
    uneven = (shapes[:, 2] % 16 > 0) + (shapes[:, 2] % 32 > 0).astype(np.int64)
    distance: Array = np.sqrt(squared + (off**2).sum(axis=0)) + UNEVEN_EXPERTS * uneven
    return distance


def period(layer_types: Sequence[str]) -> int:
    """Return the period of the layers' types: 4 for linear, linear, linear, full, ...; 1 where all are the same."""
    kinds = list(layer_types)
    return next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])


def candidates_table(candidates: Sequence[Candidate]) -> str:
    """Render the candidates as a table, best first."""
    columns = ("", "layers", "hidden", "experts", "top-k", "expert size", "total", "active", "checkpoint")
    deviations = [f"{quantity.replace('_', ' ')} vs budget" for quantity in candidates[0].deviations]
    refused = refused_by(candidates)
    table = DataTable(*columns, *deviations, "distance", *refused[:1], left=0)
    for number, candidate in enumerate(candidates, start=1):
        target = candidate.target
        table.add(
            str(number),
            str(target.num_hidden_layers),
            str(target.hidden_size),
            str(target.num_experts),
            str(target.num_experts_per_tok),
            str(target.moe_intermediate_size),
            in_parameters(candidate.counts.total_parameters),
            in_parameters(candidate.counts.active_parameters),
            bytes_in_words(candidate.checkpoint_bytes),
            *(f"{deviation:+.1%}" for deviation in candidate.deviations.values()),
            f"{candidate.distance:.2f}",
            *refused[number : number + 1],
        )
    footnote = FOOTNOTE.format(mtp="; checkpoint: with MTP" if candidates[0].counts.mtp_parameters else "")
    return f"{table.as_text(160)}\n\n{footnote}{why_refused(candidates)}"


def refused_by(candidates: Sequence[Candidate]) -> list[str]:
    """Return a column of the engines that would not load each candidate, its title first; empty where all load."""
    cells = [", ".join(refusal.engine for refusal in candidate.refusals) or "-" for candidate in candidates]
    return ["does not load in", *cells] if any(candidate.refusals for candidate in candidates) else []


def why_refused(candidates: Sequence[Candidate]) -> str:
    """Explain, for each engine, why it would not load the first shape that it refuses; a line each, for below the table."""
    first: dict[str, str] = {}
    for number, candidate in enumerate(candidates, start=1):
        for refusal, words in zip(candidate.refusals, refusals_in_words(candidate.refusals), strict=True):
            first.setdefault(refusal.engine, f"\n{number} {words}.")
    return "".join(first.values())


def write_target(candidate: Candidate, path: Path) -> None:
    """Write the candidate's shape as a TARGET.yaml for `slimqwen plan --target`."""
    sizes = candidate.target.model_dump(exclude_none=True)
    write_text(path, TEXT_MARK + "\n" + "".join(f"{field}: {size}\n" for field, size in sizes.items()))


def _choices(config: Config, align: int) -> dict[str, Sequence[int]]:
    top_k = config["num_experts_per_tok"]
    first_full = config["layer_types"].index("full_attention") if "full_attention" in config["layer_types"] else 0
    first_sparse = config["mlp_layer_types"].index("sparse")
    return {
        "num_hidden_layers": range(max(first_full, first_sparse) + 1, config["num_hidden_layers"] + 1),
        "hidden_size": _multiples(align, config["hidden_size"]),
        "num_experts": _multiples(EXPERTS_MULTIPLE, config["num_experts"]),
        "moe_intermediate_size": _multiples(align, config["moe_intermediate_size"]),
        "num_experts_per_tok": range((top_k + 1) // 2, top_k + 1),
    }


def _multiples(unit: int, largest: int) -> list[int]:
    """Return the multiples of `unit` up to `largest`, and `largest` itself."""
    return sorted({*range(unit, largest, unit), largest})
