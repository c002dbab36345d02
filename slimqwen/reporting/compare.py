"""The comparison page of several runs: results relative to the first run, curves, and differences of the recipes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimqwen.core.errors import UserError
from slimqwen.reporting.html import check_page, write_page
from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.sections import training
from slimqwen.reporting.sections.amounts import NOTHING, Cell, amount
from slimqwen.reporting.sections.cost import device_hours
from slimqwen.reporting.sections.warnings import collect_warnings
from slimqwen.reporting.titles import MAIN_RUN

ALWAYS_DIFFERENT = {"name", "run_dir"}  # fields of a recipe


@dataclass(frozen=True)
class Quantity:
    """A value in a column of the table. decimals: None for a count."""

    title: str
    value: float | None
    decimals: int | None = None


def compare(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page and return its path. Reads only files in `run_dirs`, each the folder of a run.

    Only the runs' main models are compared, not their baselines. Raises UserError as `report` does, and for a
    duplicate folder.
    """
    if len({folder.resolve() for folder in run_dirs}) < len(run_dirs):
        raise UserError("a run folder is given twice: give each once.")
    check_page(out, *run_dirs)
    runs = dict(zip(names(run_dirs), map(Run.read, run_dirs), strict=True))
    steps = {name: run.steps[MAIN_RUN] for name, run in runs.items() if MAIN_RUN in run.steps}
    columns, rows = table(runs)
    write_page(
        "compare.html.j2",
        out,
        first=next(iter(runs)),
        runs=runs,
        columns=columns,
        rows=rows,
        cautions=cautions(runs),
        warnings={name: raised for name, run in runs.items() if (raised := collect_warnings(run))},
        axes=training.axis_names(steps),
        curves=training.draw_runs(steps),
        differences=differences({name: run.recipe.model_dump(mode="json") for name, run in runs.items()}),
    )
    return out


def names(run_dirs: Sequence[Path]) -> list[str]:
    """Return the shortest suffixes of the folders' paths that are distinct."""
    parts = [folder.resolve().parts for folder in run_dirs]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(path[-length:]) for path in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(folder) for folder in run_dirs]


def table(runs: Mapping[str, Run]) -> tuple[list[str], list[tuple[str, str, list[Cell]]]]:
    """Return the columns of the table, and a row per run with its differences from the first."""
    measured = [quantities(run) for run in runs.values()]
    titles = list(dict.fromkeys(quantity.title for row in measured for quantity in row))
    shown = [
        title for title in titles if any(q.title == title and q.value is not None for row in measured for q in row)
    ]
    first = {quantity.title: quantity.value for quantity in measured[0]}
    rows = []
    for index, (name, row) in enumerate(zip(runs, measured, strict=True)):
        found = {quantity.title: quantity for quantity in row}
        cells = [_cell(found.get(title), None if index == 0 else first.get(title)) for title in shown]
        rows.append((name, name, cells))
    return shown, rows


def quantities(run: Run) -> list[Quantity]:
    """List the values of a run's main model that are compared; None where one was not measured."""
    found = []
    result = run.result
    if result is not None:
        found = [
            Quantity("total parameters", result.total_parameters),
            Quantity("active", result.active_parameters),
            Quantity("loss", result.loss, 3),
            Quantity("perplexity", result.perplexity, 2),
            Quantity("bits/byte", result.bits_per_byte, 3),
            Quantity("KL", result.kl_to_teacher, 3),
            Quantity("top-1", result.top1_agreement, 3),
            Quantity("calibration error", result.calibration_error, 3),
            *(Quantity(f"acc_{k}", share, 3) for k, share in enumerate(result.mtp_acceptance)),
            Quantity("tokens/pass", result.tokens_per_verification, 2),
        ]
    steps = run.steps.get(MAIN_RUN)
    if steps is not None:
        found.append(Quantity("tokens trained", float(steps.tokens[-1])))
        found.append(Quantity("device hours", device_hours(run, MAIN_RUN), 3))
    return found + benchmark_quantities(run)


def benchmark_quantities(run: Run) -> list[Quantity]:
    """List the benchmark scores of the run's main model, if the current one was measured."""
    if run.benchmarks is None:
        return []
    return [
        Quantity(f"{task}, {metric}", by_model[MAIN_RUN].value, 4)
        for (task, metric), by_model in run.benchmarks.lines().items()
        if MAIN_RUN in by_model
    ]


def _cell(quantity: Quantity | None, first: float | None) -> Cell:
    if quantity is None or quantity.value is None:
        return NOTHING
    value, decimals = quantity.value, quantity.decimals
    if decimals is None:
        change = "" if first is None else _signed(f"{100 * (value / first - 1):+.1f}\u00a0%")
        return Cell(amount(round(value)), value, change)
    return Cell(f"{value:,.{decimals}f}", value, "" if first is None else _signed(f"{value - first:+,.{decimals}f}"))


def _signed(difference: str) -> str:
    """Use the minus sign that is as wide as the plus."""
    return difference.replace("-", "\N{MINUS SIGN}")


def cautions(runs: Mapping[str, Run]) -> list[str]:
    """List the reasons why the values of these runs may not be comparable."""
    evaluations = [run.evaluation for run in runs.values() if run.evaluation is not None]
    teachers = [run.teacher.loss for run in runs.values() if run.teacher is not None]
    found = []
    if len(evaluations) < len(runs):
        missing = ", ".join(name for name, run in runs.items() if run.evaluation is None)
        found.append(f"Not evaluated yet: {missing}.")
    if len({(evaluation.tokens, evaluation.sequence_length) for evaluation in evaluations}) > 1:
        found.append(
            "The runs were not evaluated on the same number of tokens, or not in sequences of the same length."
        )
    elif teachers and max(teachers) - min(teachers) > 1e-3:
        found.append("The teacher’s own loss differs between the runs: another teacher, or other held-out text.")
    benchmarks = [run.benchmarks for run in runs.values() if run.benchmarks is not None]
    if len({(measured.limit, measured.shots) for measured in benchmarks}) > 1:
        found.append("The benchmarks were not run on the same number of questions, or not with as many examples.")
    return found


def differences(recipes: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """List the fields in which the recipes differ, each with its value in every recipe."""
    flat = [dict(_flat(recipe)) for recipe in recipes.values()]
    fields = dict.fromkeys(field for values in flat for field in values)
    rows = []
    for field in fields:
        values = [str(found.get(field, "–")) for found in flat]
        if field not in ALWAYS_DIFFERENT and len(set(values)) > 1:
            rows.append((field, values))
    return rows


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested mappings: {"a": {"b": 1}} -> [("a.b", 1)]."""
    found: list[tuple[str, Any]] = []
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            found += _flat(inner, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", inner))
    return found
