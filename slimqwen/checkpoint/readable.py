"""Whether what is copied at the end of a work can be read at its beginning."""

from pathlib import Path

from slimqwen.checkpoint.writer import companions
from slimqwen.core.errors import UserError


def check_companions(folder: Path) -> None:
    """Raise UserError for a file that comes along with the weights (tokenizer, template, licence) and cannot be read."""
    for file in companions(folder):
        try:
            with file.open("rb") as stream:
                stream.read(1)
        except OSError as error:
            raise UserError(
                f"{file} is copied into what is made of {folder}, and cannot be read ({error.strerror}): mend that, or move it "
                "elsewhere."
            ) from error
