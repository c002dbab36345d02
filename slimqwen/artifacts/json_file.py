"""Loading of JSON artefacts into their models, with one form of error message."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from slimqwen.core.errors import UserError
from slimqwen.core.regular_files import read_regular

Model = TypeVar("Model", bound=BaseModel)


def load_model(path: Path, model: type[Model], *, what: str, advice: str) -> Model:
    """Load `path` as `model`.

    what: the expected content, for a file with another. advice: ends the message for a file that cannot be read. Raises
    UserError for both.
    """
    try:
        return model.model_validate_json(read_regular(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {advice}") from error
    except ValidationError as error:
        raise UserError(f"{path} is not {what} ({first_problem(error)}).") from error


def first_problem(error: ValidationError) -> str:
    """Describe the first problem of an invalid file: `models.teacher.loss: Field required`."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where or 'whole file'}: {first['msg']}"
