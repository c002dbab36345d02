"""The program: its name, its help, and what becomes of Ctrl-C."""

import os
from typing import Any

import typer
from typer.core import TyperGroup

from slimqwen.errors import Interrupted, UserError

TRAINING = {"run", "demo", "pretrain", "distil", "study"}  # what saves its state as it goes


class Commands(TyperGroup):
    """Turns Ctrl-C into a sentence and its exit code, which click would swallow ("Aborted!").

    Many processes, as torchrun starts them, can only do `distil` together.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name != "distil" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"'{name}' is work for one process, and torchrun has started {os.environ['WORLD_SIZE']}: run it without "
                "torchrun, and only `slimqwen distil` with it."
            )
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if ctx.invoked_subcommand in TRAINING:
                lost = "nothing is lost but the steps since the last saved state; the same command continues."
            else:
                lost = "nothing is left half written; the same command starts again, from what it had finished if it keeps that."
            raise Interrupted(f"interrupted: {lost}") from None


app = typer.Typer(
    name="slimqwen",
    cls=Commands,
    help="Compress a pretrained Mixture-of-Experts language model: prune depth, width and experts, then distil.\n\n"
    "Start with `slimqwen demo`; then write a recipe (`slimqwen recipe` lists every field) and `slimqwen run` it. "
    "The other commands are the single stages: each reads and writes artefacts on disk and can be run alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
