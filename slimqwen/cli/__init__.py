"""The command line: parse the words, call the stage, print where the artefact is. `--help` works on every command."""

import os

from slimqwen.cli import calibrating, compressing, fitting, measuring, planning, showing, training, whole
from slimqwen.cli.app import app
from slimqwen.cli.border import guarded
from slimqwen.cli.command import Command, let_paths_begin_at_home

__all__ = ["app", "main"]

# In the order of the work, which is that of `slimqwen --help`.
MODULES = (whole, calibrating, planning, fitting, compressing, training, measuring, showing)
for module in MODULES:
    for registered in module.commands.registered_commands:
        registered.cls = Command
        if registered.callback is not None:
            let_paths_begin_at_home(registered.callback)
    app.add_typer(module.commands)


def main() -> None:
    """Run the console script: it ends with an exit code, and where it fails with one sentence."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded at run time
    guarded(app)
