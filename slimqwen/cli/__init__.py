"""The command line: parse, call the stage, say where the artefact is. `--help` on every command."""

import os
import sys

from slimqwen.cli import compressing, measuring, showing, training, whole
from slimqwen.cli.app import app
from slimqwen.cli.options import rank
from slimqwen.errors import EXIT_FAILED, Interrupted, UserError
from slimqwen.progress import say

__all__ = ["app", "main"]

for module in (whole, compressing, training, measuring, showing):  # the order of `slimqwen --help`
    app.add_typer(module.commands)


def main() -> None:
    """The console script: one sentence and an exit code for whatever a user can cause, a traceback for our own bugs."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded at run time
    try:
        app()
    except Interrupted as error:
        if rank() == 0:
            say(str(error))
        sys.exit(error.exit_code)
    except UserError as error:
        say(f"{_speaker()}error: {error}")
        sys.exit(error.exit_code)
    except OSError as error:  # a path that is a file, not writable, gone: the system's own words and the name
        problem = f"{error.filename or 'a file'}: {error.strerror or error}"
        say(f"{_speaker()}error: {problem}. Check the path and its permissions.")
        sys.exit(EXIT_FAILED)


def _speaker() -> str:
    """What precedes an error where several processes may report one."""
    return f"rank {rank()}: " if "RANK" in os.environ else ""
