"""The stage `report`: from the artefacts of a run directory to one self-contained HTML page."""

from pathlib import Path

from slimqwen.generation import DEFAULT_DRAFT
from slimqwen.reporting.after_cut import describe_after_cut
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
        subtitle=summary.describe_setup(run),
        verdict=summary.assess(run),
        tiles=summary.list_tiles(run),
        warnings=warnings.collect_warnings(run),
        results=results.tabulate_models(run),
        default_draft=DEFAULT_DRAFT,
        benchmarks=benchmarks.tabulate_benchmarks(run),
        loss_charts=results.draw_losses(run),
        shapes=shapes.compare_shapes(run),
        stages=shapes.list_stages(run),
        axes=training.axis_names(run.steps),
        curves=training.draw_curves(run),
        learning_rates=training.learning_rates(run),
        choices=choices.choices(run),
        after_cut=describe_after_cut(run.recipe),
        utilisation=utilisation.draw_utilisation(run),
        samples=results.list_samples(run),
        times=cost.list_times(run),
        training_costs=cost.tabulate_costs(run),
        energy=cost.estimate_energy(run),
    )
    return out
