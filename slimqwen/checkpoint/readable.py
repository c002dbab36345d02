"""An early check that the files which are copied at the end of the work can be read."""

from pathlib import Path

from slimqwen.checkpoint.writer import companions
from slimqwen.core.errors import UserError


def check_companions(folder: Path) -> None:
    """Raise UserError for a companion (tokenizer, template, licence) that cannot be read."""
    for file in companions(folder):
        try:
            with file.open("rb") as stream:
                stream.read(1)
        except OSError as error:
            raise UserError(
                f"{file} is copied into every model made from {folder}, and cannot be read ({error.strerror}): make it readable, "
                "or move it elsewhere."
            ) from error
