"""`slimqwen plan`: what a target costs, what to keep for it, and which target it should be."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimqwen.artifacts import check_file_replaceable
from slimqwen.cli.options import Device, DtypeOption, Seed, command_line, config_path, dtype_of, weights_of
from slimqwen.core.errors import UserError
from slimqwen.core.progress import say
from slimqwen.core.terminal import show, show_json, show_result
from slimqwen.core.warning import warn
from slimqwen.recipe import (
    CalibrationRecipe,
    DataRecipe,
    DistilRecipe,
    EvaluationRecipe,
    Execution,
    PruningRecipe,
    Recipe,
    Target,
)

if TYPE_CHECKING:  # they take numpy, which no other command's --help should wait for
    from slimqwen.shapes.counts import Comparison
    from slimqwen.shapes.fit import Candidate
    from slimqwen.shapes.footprint import TrainingSettings

COSTS = "Predicted costs"
CHOOSING = "Choosing what to keep (--statistics)"
FITTING = "Searching a target (--fit)"
MEASURING = "Searching by what cutting does (--fit with --tokens)"

TRAINING_SEQUENCE_LENGTH = 4096
MEASURED_SEQUENCE_LENGTH = 256


def plan(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CONFIG_OR_CHECKPOINT", help="A config.json, a checkpoint folder, or 'builtin'.")
    ],
    target: Annotated[
        Path | None,
        typer.Option(
            metavar="TARGET.yaml",
            help="The shape to reach: num_hidden_layers, hidden_size, num_experts, num_experts_per_tok, ...",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --statistics the plan to write (plan.json), with --fit the target (none)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    context_length: Annotated[
        int, typer.Option(min=1, help="Tokens of a sequence, for cache and FLOPs.", rich_help_panel=COSTS)
    ] = 32_768,
    gpus: Annotated[
        int, typer.Option(min=1, help="GPUs that the predicted training is sharded over.", rich_help_panel=COSTS)
    ] = 8,
    micro_batch_size: Annotated[
        int,
        typer.Option(
            min=1, help="Sequences per forward pass and GPU of the predicted training.", rich_help_panel=COSTS
        ),
    ] = 1,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=8,
            help=f"Tokens in a sequence of the predicted training ({TRAINING_SEQUENCE_LENGTH:,}); with --tokens, in one that is "
            f"measured ({MEASURED_SEQUENCE_LENGTH}).",
            show_default=False,
            rich_help_panel=COSTS,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write a page with sliders for the sizes, which computes all of this in the browser.",
            rich_help_panel=COSTS,
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Written by `slimqwen calibrate`. With it, a plan is made and written to --out.",
            rich_help_panel=CHOOSING,
        ),
    ] = None,
    pruning: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Criteria: the recipe's `pruning` section.", rich_help_panel=CHOOSING),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Choose by the paper's criteria instead.", rich_help_panel=CHOOSING)
    ] = False,
    method: Annotated[str | None, typer.Option(hidden=True)] = None,
    depth: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Written by `slimqwen measure-depth`; needed for `depth: measured`.",
            rich_help_panel=CHOOSING,
        ),
    ] = None,
    source_weights: Annotated[
        list[str] | None,
        typer.Option(
            "--source-weight",
            metavar="NAME=WEIGHT",
            help="What a source of the statistics counts for; give one for each. Default: as much as it has tokens.",
            rich_help_panel=CHOOSING,
        ),
    ] = None,
    stability: Annotated[
        bool,
        typer.Option(
            help="Say how far plans from two halves of the calibration text, and from each source, agree.",
            rich_help_panel=CHOOSING,
        ),
    ] = False,
    budgets: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="BUDGETS",
            help="List the best shapes for budgets: `total=23B,active=2B` or `checkpoint=40GB`; sizes can be pinned: "
            "`total=23B,num_hidden_layers=36`. With --out one of them is written as a target.",
            rich_help_panel=FITTING,
        ),
    ] = None,
    align: Annotated[
        int, typer.Option(min=1, help="Hidden and expert size are multiples of this.", rich_help_panel=FITTING)
    ] = 128,
    pick: Annotated[int, typer.Option(min=1, help="Number of the shape that --out gets.", rich_help_panel=FITTING)] = 1,
    tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Written by `slimqwen tokens`: rank the shapes by the KL to the teacher on its held-out text. Each axis is cut alone "
            "first; then the shapes for which that predicts least are cut, repaired as --pruning says, and measured. "
            "--statistics saves the calibration.",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    work: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder for search.json and every measurement; the same command continues from there.",
            rich_help_panel=MEASURING,
        ),
    ] = Path("search"),
    shapes: Annotated[
        int,
        typer.Option(min=1, help="Shapes to cut and measure, and the best by arithmetic.", rich_help_panel=MEASURING),
    ] = 4,
    measured_tokens: Annotated[
        int, typer.Option(min=1, help="Held-out tokens to measure on.", rich_help_panel=MEASURING)
    ] = 8192,
    samples: Annotated[
        int, typer.Option(min=1, help="Sequences to calibrate on, and to refit on.", rich_help_panel=MEASURING)
    ] = 256,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Parameters and costs before and after, from the config alone; with statistics, choose what to keep.

    Costs: bytes on disk, KV cache and recurrent state, FLOPs, training memory; and the engines that would not load the result.
    With --fit, search the shape itself: by arithmetic, or with --tokens by what cutting to it does (docs/search.md).
    """
    from slimqwen.recipe.file import load_recipe
    from slimqwen.shapes.counts import comparison_table
    from slimqwen.shapes.footprint import TrainingSettings

    if tokens is not None and budgets is None:
        raise UserError("--tokens measures the shapes of a search: give --fit too, e.g. --fit total=23B,active=2B.")
    if html is not None and (statistics is not None or budgets is not None):
        raise UserError("--html is a page for choosing a target: give it without --statistics and --fit.")
    if statistics is None and (
        stability or depth or (tokens is None and (pruning is not None or paper or method or source_weights))
    ):
        raise UserError(
            "--pruning, --paper, --depth, --source-weight and --stability choose by statistics: give --statistics too."
        )
    if budgets is not None and (target is not None or stability or (statistics is not None and tokens is None)):
        raise UserError(
            "--fit searches a target from the config alone: give it without --target and --stability, "
            "and --statistics only to measure, with --tokens."
        )
    criteria = _criteria(pruning, paper=paper or _is_papers(method))
    if source_weights:
        criteria = criteria.model_copy(update={"source_weights": weights_of("--source-weight", source_weights)})

    if budgets is not None and tokens is not None:
        recipe = _search_recipe(
            checkpoint,
            criteria,
            run_dir=work,
            sequence_length=sequence_length or MEASURED_SEQUENCE_LENGTH,
            samples=samples,
            measured_tokens=measured_tokens,
            seed=seed,
            execution=Execution(device=device),
            dtype=dtype_of(dtype),
        )
        _search(recipe, budgets, tokens, statistics, align, shapes, pick, out, as_json)
    elif budgets is not None:
        _fit(config_path(checkpoint), budgets, align, pick, out, as_json)
    else:
        wanted = Target() if target is None else load_recipe(target, model=Target)
        training = TrainingSettings(
            gpus=gpus, micro_batch_size=micro_batch_size, sequence_length=sequence_length or TRAINING_SEQUENCE_LENGTH
        )
        if statistics is None:
            comparison = _costs(config_path(checkpoint), wanted, context_length, training, out, html)
        else:
            comparison = _plan(
                checkpoint, wanted, statistics, criteria, depth, context_length, training, out, stability, as_json
            )
        show_result(comparison, comparison_table, as_json)


def _criteria(file: Path | None, *, paper: bool) -> PruningRecipe:
    """Return the criteria of a file, the paper's, or the default ones. Raises UserError for a file and the paper's."""
    from slimqwen.recipe.file import load_recipe

    if paper and file is not None:
        raise UserError("--paper is a `pruning` section of its own: give it without --pruning.")
    if paper:
        return PruningRecipe().as_published()
    return PruningRecipe() if file is None else load_recipe(file, model=PruningRecipe)


def _is_papers(method: str | None) -> bool:
    """Read the option `--method`, which version 0.1 spelled the paper's criteria with."""
    if method not in (None, "slimqwen", "slimqwen-paper"):
        raise UserError(f"--method {method}: give --paper for the paper's criteria, or --pruning with your own.")
    if method is not None:
        spelling = "--paper" if method == "slimqwen-paper" else "left out"
        warn(f"--method {method} is written {spelling} since 0.2")
    return method == "slimqwen-paper"


def _costs(
    config_file: Path,
    target: Target,
    context_length: int,
    training: "TrainingSettings",
    out: Path | None,
    html: Path | None,
) -> "Comparison":
    """From the config alone."""
    from slimqwen.checkpoint.config import read_config
    from slimqwen.shapes.counts import compare

    if out is not None:
        raise UserError("--out takes the plan of --statistics or the target of --fit: give one of these too.")
    if html is not None:
        check_file_replaceable(html, config_file)
    family, config = read_config(config_file)
    comparison = compare(family, config, target, context_length=context_length, training=training)
    if html is not None:
        from slimqwen.reporting.planner_page import write_planner_page

        write_planner_page(family, config, target, html)
        say(f"planner page written to {html}")
    return comparison


def _plan(
    checkpoint: str,
    target: Target,
    statistics: Path,
    pruning: PruningRecipe,
    depth: Path | None,
    context_length: int,
    training: "TrainingSettings",
    out: Path | None,
    stability: bool,
    as_json: bool,
) -> "Comparison":
    """With statistics: the stage."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.checkpoint.reader import Checkpoint
    from slimqwen.planning.chosen import choice_text
    from slimqwen.planning.plan import plan as run_stage
    from slimqwen.planning.stability import stability_text
    from slimqwen.shapes.counts import compare

    out = out or Path("plan.json")
    folder = checkpoint_folder(checkpoint)
    made = run_stage(
        folder, out, statistics=statistics, target=target, pruning=pruning, depth=depth, stability=stability
    )
    if not as_json:
        if chosen := choice_text(made):
            show(*chosen.split("\n"), "")
        if made.stability is not None:
            show(*stability_text(made.stability).split("\n"))
    say(f"plan written to {out}")
    source = Checkpoint(folder)
    return compare(
        source.family,
        source.config,
        made.target,
        made.kept_layers,
        context_length=context_length,
        training=training,
        layouts=source.layouts,
    )


def _fit(config_file: Path, budgets: str, align: int, pick: int, out: Path | None, as_json: bool) -> None:
    from slimqwen.checkpoint.config import read_config
    from slimqwen.shapes.fit import candidates_table, fit

    if out is not None:
        check_file_replaceable(out, config_file)
    candidates = fit(*read_config(config_file), budgets, align=align)
    if as_json:
        show_json(json.dumps([candidate.model_dump() for candidate in candidates], indent=2))
    else:
        show(*candidates_table(candidates).split("\n"))
    _write_picked(candidates, pick, out)


def _search(
    recipe: Recipe,
    budgets: str,
    tokens: Path,
    statistics: Path | None,
    align: int,
    shapes: int,
    pick: int,
    out: Path | None,
    as_json: bool,
) -> None:
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.search.result import tables
    from slimqwen.search.search import search

    if out is not None:
        check_file_replaceable(out, tokens, checkpoint_folder(recipe.teacher))
    result = search(
        recipe, budgets, tokens=tokens, statistics=statistics, align=align, shapes=shapes, command=command_line()
    )
    show_result(result, tables, as_json)
    _write_picked([shape.candidate for shape in result.shapes], pick, out)


def _search_recipe(
    checkpoint: str,
    pruning: PruningRecipe,
    *,
    sequence_length: int,
    samples: int,
    measured_tokens: int,
    **settings: Any,
) -> Recipe:
    """What a search reads of a recipe. Its target is what is searched, and nothing is trained."""
    if config_path(checkpoint).is_file():
        raise UserError(
            f"--tokens measures cut models, and {checkpoint} is a config without weights: give a checkpoint folder, or leave "
            "out --tokens to search by arithmetic."
        )
    return Recipe(
        teacher=checkpoint,
        target=Target(),
        pruning=pruning,
        data=DataRecipe(sequence_length=sequence_length),
        calibration=CalibrationRecipe(samples=samples),
        evaluation=EvaluationRecipe(tokens=measured_tokens),
        distil=DistilRecipe(tokens=1),
        **settings,
    )


def _write_picked(candidates: "Sequence[Candidate]", pick: int, out: Path | None) -> None:
    from slimqwen.shapes.fit import write_target

    if pick > len(candidates):
        raise UserError(f"--pick {pick}: the list has {len(candidates)} shapes.")
    if out is not None:
        write_target(candidates[pick - 1], out)
        say(f"target {pick} written to {out}")
