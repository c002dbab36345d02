"""The program: its name and its help."""

from typing import Any

import typer
from typer.core import TyperGroup

from slimqwen.cli.border import safe_usage_error


class Commands(TyperGroup):
    """The program's commands; what is wrong with the words of a command line is told without their control characters."""

    def make_context(self, *args: Any, **settings: Any) -> Any:
        with safe_usage_error():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: Any) -> Any:
        with safe_usage_error():
            return super().invoke(ctx)


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
