"""The commands that look for a target: plan fit, plan search, plan page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimqwen.artifacts import check_file_replaceable
from slimqwen.cli.options import (
    AsJson,
    CheckpointName,
    ConfigOrCheckpoint,
    Device,
    DtypeOption,
    MeasuredTokens,
    Seed,
    SequenceLength,
    TargetFile,
    TokensFolder,
    command_line,
    config_path,
    criteria_of,
    dtype_of,
)
from slimqwen.core.errors import UserError
from slimqwen.core.progress import say
from slimqwen.core.terminal import show, show_json, show_result
from slimqwen.core.torchrun import rank
from slimqwen.recipe import Execution, Target

if TYPE_CHECKING:  # it takes numpy, which no other command's --help should wait for
    from slimqwen.shapes.fit import Candidate

commands = typer.Typer()

Budgets = Annotated[
    str,
    typer.Argument(
        metavar="BUDGETS",
        help="Sizes to meet: `total=23B,active=2B` or `checkpoint=40GB`. Sizes can be pinned: "
        "`total=23B,num_hidden_layers=36`.",
    ),
]
TargetOut = Annotated[Path | None, typer.Option("--out", help="Write one of the shapes to this file, as a target.")]
Pick = Annotated[int, typer.Option(min=1, help="Number of the shape that --out gets.")]
Align = Annotated[int, typer.Option(min=1, help="Hidden and expert size are multiples of this.")]
Shapes = Annotated[int, typer.Option(min=1, help="Shapes to cut and measure, and the best by arithmetic.")]
Paper = Annotated[bool, typer.Option("--paper", help="Cut by the paper's criteria.")]
HowToCut = Annotated[
    Path | None,
    typer.Option("--pruning", metavar="FILE.yaml", help="How to cut: the recipe's `pruning` section."),
]
SourceWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--source-weight", metavar="NAME=WEIGHT", help="Weight of a source of --statistics; give one for each."
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Written by `slimqwen calibrate`. Default: calibrate on --tokens."),
]
Work = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help="Folder for search.json and every measurement; the same command continues from there.",
    ),
]


@commands.command("plan fit")
def plan_fit(
    checkpoint: ConfigOrCheckpoint,
    budgets: Budgets,
    out: TargetOut = None,
    pick: Pick = 1,
    align: Align = 128,
    as_json: AsJson = False,
) -> None:
    """List the best shapes within budgets, from the config alone: those in proportions like the paper's come first."""
    from slimqwen.checkpoint.config import read_config
    from slimqwen.shapes.fit import candidates_table, fit

    config_file = config_path(checkpoint)
    if out is not None:
        check_file_replaceable(out, config_file)
    candidates = fit(*read_config(config_file), budgets, align=align)
    if as_json:
        show_json(json.dumps([candidate.model_dump() for candidate in candidates], indent=2))
    else:
        show(*candidates_table(candidates).split("\n"))
    _write_picked(candidates, pick, out)


@commands.command("plan search")
def plan_search(
    checkpoint: CheckpointName,
    budgets: Budgets,
    tokens: TokensFolder,
    out: TargetOut = None,
    pick: Pick = 1,
    align: Align = 128,
    shapes: Shapes = 4,
    pruning: HowToCut = None,
    paper: Paper = False,
    source_weights: SourceWeights = None,
    statistics: Statistics = None,
    work: Work = Path("search"),
    measured_tokens: MeasuredTokens = 8192,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to calibrate on, and to refit on.")] = 256,
    sequence_length: SequenceLength = 256,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Rank the shapes within budgets by what cutting to them does: the KL to the teacher on held-out text.

    Each axis is cut alone first; then the shapes for which that predicts least are cut, refitted as --pruning sets it, and
    measured (docs/search.md).
    """
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.search.result import tables
    from slimqwen.search.search import search
    from slimqwen.search.settings import SearchSettings

    if config_path(checkpoint).is_file():
        raise UserError(
            f"a search measures cut models, and {checkpoint} is a config without weights: give a checkpoint folder, or "
            "search by arithmetic, with `slimqwen plan fit`."
        )
    if out is not None:
        check_file_replaceable(out, tokens, checkpoint_folder(checkpoint))
    settings = SearchSettings(
        pruning=criteria_of(pruning, paper, source_weights),
        samples=samples,
        measured_tokens=measured_tokens,
        sequence_length=sequence_length,
        seed=seed,
        dtype=dtype_of(dtype),
        align=align,
        shapes=shapes,
    )
    result = search(
        checkpoint,
        budgets,
        work,
        tokens=tokens,
        statistics=statistics,
        settings=settings,
        execution=Execution(device=device),
        command=command_line(),
    )
    show_result(result, tables, as_json)
    _write_picked([shape.candidate for shape in result.shapes], pick, out)


def _write_picked(candidates: "Sequence[Candidate]", pick: int, out: Path | None) -> None:
    """Write one of the shapes to `out`, where that is given."""
    from slimqwen.shapes.fit import write_target

    if pick > len(candidates):
        raise UserError(f"--pick {pick}: the list has {len(candidates)} shapes.")
    if out is not None and rank() == 0:
        write_target(candidates[pick - 1], out)
        say(f"target {pick} written to {out}")


@commands.command("plan page")
def plan_page(
    checkpoint: ConfigOrCheckpoint,
    target: TargetFile = None,
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("planner.html"),
) -> None:
    """Write a page with sliders for the sizes, which computes the costs in a browser, without any request."""
    from slimqwen.recipe.file import load_recipe

    write_page(checkpoint, Target() if target is None else load_recipe(target, model=Target), out)


def write_page(checkpoint: str, target: Target, out: Path) -> None:
    """Write the page with its sliders at a target."""
    from slimqwen.checkpoint.config import read_config
    from slimqwen.reporting.planner_page import write_planner_page

    config_file = config_path(checkpoint)
    check_file_replaceable(out, config_file)
    write_planner_page(*read_config(config_file), target, out)
    say(f"planner page written to {out}")
