"""The stage `report`: from the artefacts of a run directory to one self-contained HTML page."""

from pathlib import Path

from slimqwen.generation import DEFAULT_DRAFT
from slimqwen.reporting.html import check_page, write_page
from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.sections import (
    benchmarks,
    choices,
    cost,
    results,
    shapes,
    summary,
    training,
    utilisation,
    warnings,
)


def report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of a run, finished or not, and return its path (`run_dir`/report.html by default).

    Reads only files in `run_dir`. A section without its artefact is left out. Raises UserError where
    `run_dir` is not a run's folder, or one of its artefacts is invalid.
    """
    out = run_dir / "report.html" if out is None else out
    check_page(out, run_dir)
    run = Run.read(run_dir)
    write_page(
        "page.html.j2",
        out,
        recipe=run.recipe,
        recipe_text=run.recipe_text,
        provenance=run.provenance,
        has_mtp=run.has_mtp,
        subtitle=summary.subtitle(run),
        verdict=summary.assess(run),
        tiles=summary.tiles(run),
        warnings=warnings.warnings(run),
        results=results.results(run),
        default_draft=DEFAULT_DRAFT,
        benchmarks=benchmarks.benchmarks(run),
        loss_charts=results.where_the_loss_is(run),
        shapes=shapes.shapes(run),
        stages=shapes.stages(run),
        axes=training.axis_names(run.steps),
        curves=training.curves(run),
        learning_rates=training.learning_rates(run),
        choices=choices.choices(run),
        utilisation=utilisation.utilisation(run),
        samples=results.samples(run),
        times=cost.times(run),
        training_costs=cost.training_costs(run),
        energy=cost.energy(run),
    )
    return out
