"""The stage `report`: the artefacts of a run directory in, one self-contained HTML page out."""

from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from slimqwen.artifacts import write_text
from slimqwen.reporting import sections
from slimqwen.reporting.run_folder import Run


def report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of a run, finished or not, and return its path (`run_dir`/report.html by default).

    Reads nothing outside `run_dir`. A section whose artefact is not there is left out. Raises UserError where
    `run_dir` is not a run's folder, or one of its artefacts is not what its name says.
    """
    run = Run.read(run_dir)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("page.html.j2").render(
        recipe=run.recipe,
        recipe_text=run.recipe_text,
        provenance=run.provenance,
        subtitle=sections.subtitle(run),
        verdict=sections.verdict(run),
        tiles=sections.tiles(run),
        results=sections.results(run),
        shapes=sections.shapes(run),
        stages=sections.stages(run),
        curves=sections.curves(run),
        choices=sections.choices(run),
        utilisation=sections.utilisation(run),
        samples=sections.samples(run),
        times=sections.times(run),
        plotly_js=Markup(get_plotlyjs()),  # the library's own text, from the installed package
    )
    out = run_dir / "report.html" if out is None else out
    write_text(out, page)
    return out
