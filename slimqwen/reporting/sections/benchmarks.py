"""The section on benchmarks, where `slimqwen evaluate --tasks` has measured them."""

from dataclasses import dataclass

from slimqwen.evaluation.benchmark_results import Result
from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.sections.amounts import NOTHING, Cell
from slimqwen.reporting.titles import title_of


@dataclass(frozen=True)
class BenchmarkTable:
    """The table of benchmarks. teacher: the model that differences refer to; None where there are none."""

    teacher: str | None
    limit: int | None
    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]  # name, title, cells


def tabulate_benchmarks(run: Run) -> BenchmarkTable | None:
    """Make the table: a row per model, the teacher first, and a column per task and metric."""
    found = run.benchmarks
    if found is None:
        return None
    lines = found.lines()
    documents = [max(result.documents for result in by_model.values()) for by_model in lines.values()]
    rows = []
    for model in found.models:
        cells = [_cell(by_model.get(model), is_teacher=model == found.teacher) for by_model in lines.values()]
        rows.append((model, title_of(model), cells))
    columns = [f"{task}, {metric}, n = {n:,}" for (task, metric), n in zip(lines, documents, strict=True)]
    return BenchmarkTable(found.teacher, found.limit, columns, rows)


def _cell(result: Result | None, *, is_teacher: bool) -> Cell:
    if result is None:
        return NOTHING
    change = "" if result.change is None or is_teacher else result.change.replace("-", "\N{MINUS SIGN}")
    return Cell(result.score, result.value, change)
