"""The commands that write pages: report, study."""

from pathlib import Path
from typing import Annotated

import typer

from slimqwen.cli.options import (
    Overrides,
    command_line,
)
from slimqwen.core.terminal import show

commands = typer.Typer()


@commands.command()
def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Folder of a run; several are compared.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Page to write. Default: report.html in the folder; comparison.html for several."),
    ] = None,
) -> None:
    """Write the HTML report of a run, or one that compares runs: one page, no external requests."""
    from slimqwen.reporting.compare import compare
    from slimqwen.reporting.report import report as run_stage

    if len(run_dirs) == 1:
        show(str(run_stage(run_dirs[0], out)))
    else:
        show(str(compare(run_dirs, out or Path("comparison.html"))))


@commands.command()
def study(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="init, experts, losses, mtp, schedules, depth, width or rotation.")
    ],
    scale: Annotated[
        str, typer.Option(metavar="cpu|gpu|RECIPE.yaml", help="The recipe that is varied: built in, or your own.")
    ] = "cpu",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per arm; with one there are no intervals.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder of results.json and index.html; docs/study/NAME-SCALE by default.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Repeat one of the paper's comparisons: every arm on the same tokens, several seeds, verdicts from the numbers.

    Work is shared between studies and continues where it was interrupted; it lies in the recipe's run_dir.
    """
    from slimqwen.study.scales import load_scale, pretrain_teacher
    from slimqwen.study.study import definition_of
    from slimqwen.study.study import study as run_study

    definition_of(name)
    recipe = load_scale(scale, overrides or [])
    pretrain_teacher(scale, recipe)
    folder = out or Path("docs") / "study" / f"{name}-{recipe.name}"
    result = run_study(name, recipe, folder, seeds=seeds, command=command_line())
    for verdict in result.verdicts:
        show(verdict.sentence)
    show(str(folder / "index.html"))
