"""The program: its name, its help and its version."""

import platform
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from slimqwen.cli.border import safe_usage_error
from slimqwen.cli.old_spellings import current_spelling
from slimqwen.core.terminal import show


class Commands(TyperGroup):
    """The program's commands. A name may have two words, as `plan fit` has; `plan` alone is a command too.

    What is wrong with the words of a command line is printed without their control characters.
    """

    def make_context(self, *args: Any, **settings: Any) -> Any:
        with safe_usage_error():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: Any) -> Any:
        with safe_usage_error():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        args = current_spelling(args)
        two_words = " ".join(args[:2])
        if two_words in self.commands:
            return super().resolve_command(ctx, [two_words, *args[2:]])
        if args[:1] == ["plan"] and len(args) > 1 and not Path(args[1]).exists():
            near = get_close_matches(two_words, self.commands, n=1, cutoff=0.85)
            if near and near != ["plan"]:
                ctx.fail(f"There is no checkpoint '{args[1]}'. Did you mean the command '{near[0]}'?")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="slimqwen",
    cls=Commands,
    help="Compress a pretrained Mixture-of-Experts language model: prune depth, width and experts, then distil.\n\n"
    "Start with `slimqwen demo`; then write a recipe (`slimqwen recipe` lists every field) and `slimqwen run` it. "
    "The other commands are the single stages: each reads and writes artefacts on disk and can be run alone.",
    epilog="Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 70 a fault of slimqwen (SLIMQWEN_TRACEBACK=1 prints its "
    "traceback), 75 stopped by SIGTERM with the training state saved, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def show_version(wanted: bool) -> None:
    """Print the version and those of the libraries that results depend on, and end."""
    if wanted:
        libraries = ", ".join(f"{library} {version(library)}" for library in ("torch", "transformers"))
        show(f"slimqwen {version('slimqwen')} ({libraries}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def program(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Read the options that stand before a command."""
