"""The command line: parse, call the stage, say where the artefact is. `--help` on every command."""

import os

from slimqwen.cli import compressing, measuring, showing, training, whole
from slimqwen.cli.app import app
from slimqwen.cli.border import guarded
from slimqwen.cli.command import Command, let_paths_begin_at_home

__all__ = ["app", "main"]

for module in (whole, compressing, training, measuring, showing):  # the order of `slimqwen --help`
    for registered in module.commands.registered_commands:
        registered.cls = Command
        if registered.callback is not None:
            let_paths_begin_at_home(registered.callback)
    app.add_typer(module.commands)


def main() -> None:
    """The console script: one sentence and an exit code, whatever happens."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded at run time
    guarded(app)
