"""`slimqwen plan`: what a target costs, and what to keep for it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimqwen.cli.fitting import write_page
from slimqwen.cli.old_spellings import warn_of_old
from slimqwen.cli.options import AsJson, TargetFile, config_path, criteria_of
from slimqwen.cli.placing import hardware_of, refuse_without_memory, show_placements
from slimqwen.core.errors import UserError
from slimqwen.core.progress import say
from slimqwen.core.terminal import show, show_result
from slimqwen.recipe import PruningRecipe, Target

if TYPE_CHECKING:  # they take numpy, which no other command's --help should wait for
    from slimqwen.planning.plan import Plan
    from slimqwen.shapes.counts import Comparison
    from slimqwen.shapes.training_memory import TrainingSettings

commands = typer.Typer()

COSTS = "Predicted costs"
GPUS = "What fits (--gpu-memory)"
CHOOSING = "Choosing what to keep (--statistics)"

PlanOut = Annotated[
    Path | None, typer.Option("--out", help="With --statistics: the plan to write. Default: plan.json.")
]
ContextLength = Annotated[
    int, typer.Option(min=1, help="Tokens of a sequence, for cache and FLOPs.", rich_help_panel=COSTS)
]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs that the predicted training runs on.", rich_help_panel=COSTS)]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of a GPU, as 80GB. With it, the settings that fit are shown instead of costs, the recommended one first.",
        rich_help_panel=GPUS,
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Memory of a node, as 200GB. Default: as much as is needed.", rich_help_panel=GPUS
    ),
]
GpuName = Annotated[
    str,
    typer.Option(
        "--gpu",
        help="Kind of GPU, for the estimated times: a100, h100, h200, b200, l40s, rtx4090.",
        rich_help_panel=GPUS,
    ),
]
GpusPerNode = Annotated[int, typer.Option(min=1, help="GPUs of a node.", rich_help_panel=GPUS)]
RecipeOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Where a recipe is given: override a field, e.g. `--set teacher=config.json`. Repeatable.",
        rich_help_panel=GPUS,
    ),
]
ModelOrRecipe = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG_OR_CHECKPOINT",
        help="A config.json, a checkpoint folder, or 'builtin'; with --gpu-memory a recipe, RECIPE.yaml, too.",
    ),
]
MicroBatchSize = Annotated[
    int,
    typer.Option(min=1, help="Sequences per forward pass and GPU of the predicted training.", rich_help_panel=COSTS),
]
TrainingLength = Annotated[
    int, typer.Option(min=8, help="Tokens in a sequence of the predicted training.", rich_help_panel=COSTS)
]
Statistics = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Written by `slimqwen calibrate`. With it, a plan is made and written to --out.",
        rich_help_panel=CHOOSING,
    ),
]
Pruning = Annotated[
    Path | None,
    typer.Option(metavar="FILE.yaml", help="Criteria: the recipe's `pruning` section.", rich_help_panel=CHOOSING),
]
Paper = Annotated[bool, typer.Option("--paper", help="Choose by the paper's criteria.", rich_help_panel=CHOOSING)]
DepthFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Written by `slimqwen measure-depth`; needed for `depth: measured`.",
        rich_help_panel=CHOOSING,
    ),
]
SourceWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--source-weight",
        metavar="NAME=WEIGHT",
        help="Weight of a source of the statistics; give one for each. Default: its number of tokens.",
        rich_help_panel=CHOOSING,
    ),
]
Stability = Annotated[
    bool,
    typer.Option(
        help="Show how far plans from two halves of the calibration text, and from each source, agree.",
        rich_help_panel=CHOOSING,
    ),
]
Html = Annotated[Path | None, typer.Option(hidden=True)]  # version 0.1's `slimqwen plan page`


@commands.command()
def plan(
    checkpoint: ModelOrRecipe,
    target: TargetFile = None,
    out: PlanOut = None,
    as_json: AsJson = False,
    context_length: ContextLength = 32_768,
    gpus: Gpus = 8,
    micro_batch_size: MicroBatchSize = 1,
    sequence_length: TrainingLength = 4096,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    gpu: GpuName = "h100",
    gpus_per_node: GpusPerNode = 8,
    overrides: RecipeOverrides = None,
    statistics: Statistics = None,
    pruning: Pruning = None,
    paper: Paper = False,
    depth: DepthFile = None,
    source_weights: SourceWeights = None,
    stability: Stability = False,
    html: Html = None,
) -> None:
    """Show what a target costs, from the config alone; with --statistics, choose what to keep for it and write the plan.

    Costs: parameters, bytes on disk, KV cache and recurrent state, FLOPs, training memory; and the engines that would not load the
    result. With --gpu-memory: the settings with which the training fits. `slimqwen plan fit` lists shapes for a budget, `plan search` measures them, `plan page` has sliders for them.
    """
    from slimqwen.checkpoint.config import read_config
    from slimqwen.recipe.file import load_recipe
    from slimqwen.shapes.counts import compare, comparison_table
    from slimqwen.shapes.training_memory import TrainingSettings

    if gpu_memory is not None:
        if statistics is not None or out is not None:
            raise UserError(
                "--statistics and --out make a plan: give them without --gpu-memory, which shows what fits."
            )
        hardware = hardware_of(gpus, gpus_per_node, gpu_memory, host_memory, gpu)
        show_placements(checkpoint, target, overrides or [], hardware, sequence_length, as_json)
        return
    refuse_without_memory(checkpoint, overrides, host_memory)
    wanted = Target() if target is None else load_recipe(target, model=Target)
    training = TrainingSettings(gpus=gpus, micro_batch_size=micro_batch_size, sequence_length=sequence_length)
    if statistics is None:
        if pruning or paper or depth or source_weights or stability:
            raise UserError(
                "--pruning, --paper, --depth, --source-weight and --stability choose by statistics: give --statistics too."
            )
        if out is not None:
            raise UserError("--out takes the plan that --statistics makes: give --statistics too.")
        if html is not None:
            warn_of_old("slimqwen plan CONFIG --html PAGE", "slimqwen plan page CONFIG --out PAGE")
            write_page(checkpoint, wanted, html)
        family, config = read_config(config_path(checkpoint))
        comparison = compare(family, config, wanted, context_length=context_length, training=training)
    else:
        criteria = criteria_of(pruning, paper, source_weights)
        made = _choose(checkpoint, out or Path("plan.json"), statistics, wanted, criteria, depth, stability, as_json)
        comparison = _compare_planned(checkpoint, made, context_length, training)
    show_result(comparison, comparison_table, as_json)


def _choose(
    checkpoint: str,
    out: Path,
    statistics: Path,
    target: Target,
    pruning: PruningRecipe,
    depth: Path | None,
    stability: bool,
    as_json: bool,
) -> "Plan":
    """Make the plan, and show what was chosen unless JSON is to follow."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.planning.chosen import choice_text
    from slimqwen.planning.plan import plan as run_stage
    from slimqwen.planning.stability import stability_text

    made = run_stage(
        checkpoint_folder(checkpoint),
        out,
        statistics=statistics,
        target=target,
        pruning=pruning,
        depth=depth,
        stability=stability,
    )
    if not as_json:
        if chosen := choice_text(made):
            show(*chosen.split("\n"), "")
        if made.stability is not None:
            show(*stability_text(made.stability).split("\n"))
    say(f"plan written to {out}")
    return made


def _compare_planned(checkpoint: str, made: "Plan", context_length: int, training: "TrainingSettings") -> "Comparison":
    """Compare the checkpoint before and after the cut of a plan."""
    from slimqwen.builtin import checkpoint_folder
    from slimqwen.checkpoint.reader import Checkpoint
    from slimqwen.shapes.counts import compare

    source = Checkpoint(checkpoint_folder(checkpoint))
    return compare(
        source.family,
        source.config,
        made.target,
        made.kept_layers,
        context_length=context_length,
        training=training,
        layouts=source.layouts,
    )
