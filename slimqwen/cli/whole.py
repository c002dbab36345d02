"""The commands for whole runs and their recipes: run, demo, recipe, pretrain."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from slimqwen.cli.options import (
    Overrides,
    RecipeFile,
    command_line,
)
from slimqwen.core.terminal import show
from slimqwen.core.torchrun import rank
from slimqwen.recipe import PretrainRecipe, Recipe

commands = typer.Typer()


@commands.command()
def run(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run a whole recipe: tokens, calibrate, plan, prune, distil (stage after stage), evaluate, report.

    Steps whose inputs have not changed are skipped, and an interrupted run continues: give the same command again.
    """
    from slimqwen.recipe.file import load_recipe

    _run(load_recipe(recipe, overrides or [], quiet=rank() > 0))


@commands.command()
def demo(
    run_dir: Annotated[Path, typer.Option(help="Folder of every artefact of the run.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """Compress the built-in teacher to a third of its parameters, beside the paper's cut and random weights, on a CPU.

    The same as `slimqwen run` with the built-in recipe, on the standard library of the Python that runs it; nothing is
    downloaded.
    """
    from slimqwen.builtin import DEMO_RECIPE
    from slimqwen.recipe.file import load_recipe

    _run(load_recipe(DEMO_RECIPE, [f"run_dir={json.dumps(str(run_dir))}", *(overrides or [])], quiet=rank() > 0))


def _run(recipe: Recipe) -> None:
    """Run a recipe, and print its table and where everything lies."""
    from slimqwen.evaluation.result import Evaluation
    from slimqwen.reporting.table import print_table
    from slimqwen.runs.recipe_run import run as run_recipe
    from slimqwen.runs.recipe_run import summary

    started = time.monotonic()
    folder = run_recipe(recipe, command_line())
    if rank() > 0:
        return
    print_table(Evaluation.load(folder / "evaluation.json"))
    show(*summary(folder, time.monotonic() - started).split("\n"))


@commands.command()
def recipe(
    pretraining: Annotated[
        bool, typer.Option("--pretrain", help="List the fields of a `slimqwen pretrain` recipe instead.")
    ] = False,
) -> None:
    """List every field of a recipe with its type, default and meaning."""
    from slimqwen.recipe.file import describe

    show(*describe(PretrainRecipe if pretraining else Recipe).split("\n"))


@commands.command()
def pretrain(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml", help="`slimqwen recipe --pretrain` lists its fields.")
    ],
    overrides: Overrides = None,
) -> None:
    """Train a tokenizer and a small model from random weights: how the built-in teacher was made."""
    from slimqwen.recipe.file import load_recipe
    from slimqwen.runs.pretrain import pretrain as run_stage

    show(str(run_stage(load_recipe(recipe, overrides or [], model=PretrainRecipe))))
