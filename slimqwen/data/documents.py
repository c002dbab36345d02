"""The documents of one file: text, or a table with a document in each row.

Tables are read with `json` and `pyarrow` rather than `datasets`, which cannot stream .jsonl whose later rows have
other keys than the first ones (CastError), takes brackets in a path for a pattern and leaves lock files in the
user's cache.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slimqwen.errors import UserError, did_you_mean

OnSkip = Callable[[str, str], None]  # called with a document's name and why it was left out
OnRead = Callable[[int], None]  # called with the bytes of the files as they are read


@dataclass(frozen=True)
class Document:
    name: str
    text: str


def read_documents(name: str, path: Path, text_field: str, on_skip: OnSkip, on_read: OnRead) -> Iterator[Document]:
    """The documents of one file, called `name` or, in a table, `name:row`; those without text come out empty."""
    try:
        if path.suffix == ".jsonl":
            yield from _jsonl_rows(name, path, text_field, on_skip, on_read)
        elif path.suffix == ".parquet":
            yield from _parquet_rows(name, path, text_field, on_read)
        else:
            content = path.read_bytes()
            on_read(len(content))
            yield Document(name, content.decode("utf-8"))
    except UnicodeDecodeError:
        on_skip(name, "not UTF-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _jsonl_rows(name: str, path: Path, text_field: str, on_skip: OnSkip, on_read: OnRead) -> Iterator[Document]:
    with path.open("rb") as lines:
        for row, line in enumerate(lines):
            on_read(len(line))
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                on_skip(f"{name}:{row}", "not UTF-8")
                continue
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {row + 1} is not JSON.") from error
            if not isinstance(value, dict):
                raise UserError(f"{path} line {row + 1} is not a JSON object with a field {text_field!r}.")
            if text_field not in value:
                raise _no_such_column(f"{path} line {row + 1}", text_field, list(value))
            text = _text_of_cell(value[text_field], f"{path} line {row + 1}", text_field)
            if not _encodable(text):  # JSON can spell half of a surrogate pair, "\ud800", which no UTF-8 text holds
                on_skip(f"{name}:{row}", "not UTF-8")
                continue
            yield Document(f"{name}:{row}", text)


def _parquet_rows(name: str, path: Path, text_field: str, on_read: OnRead) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if text_field not in table.schema_arrow.names:
                raise _no_such_column(str(path), text_field, table.schema_arrow.names)
            row, rows, size = 0, table.metadata.num_rows, path.stat().st_size
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    yield Document(f"{name}:{row}", _text_of_cell(value, f"{path} row {row}", text_field))
                    row += 1
                on_read(row * size // rows - (row - len(batch)) * size // rows)
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error}).") from error


def _text_of_cell(value: object, where: str, text_field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {text_field!r} holds {type(value).__name__}, not text: set text_field to the text's column."
        )
    return value


def _no_such_column(where: str, text_field: str, columns: list[str]) -> UserError:
    known = ", ".join(repr(column) for column in columns)
    return UserError(
        f"{where} has no column {text_field!r}{did_you_mean(text_field, columns)}; it has {known}: set text_field."
    )


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
