"""Reading of tables one row at a time: one row and a buffer of the file are in memory.

It uses `json`, `csv` and `pyarrow.parquet` rather than `datasets`, which loads a .json list whole, cannot stream
.jsonl whose later rows have other keys than the first ones (CastError), treats brackets in a path as a pattern and
leaves lock files in the user's cache.
"""

import csv
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO

from slimqwen.checkpoint.config import refuse_pointer
from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.data.formats import CODECS, OnRead, open_stream
from slimqwen.recipe import TextFormat

JSON_CHARACTERS = 1 << 20  # read at one time; more where a row is longer
LONGEST_ROW = (
    1 << 27
)  # characters of a JSON row: a longer one means that the file is not a table, and would be read whole
OTHER_DELIMITERS = (";", "\t", "|")  # tried where the header lacks the usual one
CSV_FIELD_CHARACTERS = 1 << 30  # limit of one field; csv's own is 128 KiB
PARQUET_ROWS = 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WHITE_SPACE = re.compile(r"\s*")
NEAR_THE_END = 16  # characters; no escape, literal or delimiter of JSON is longer


class Row(NamedTuple):
    """A row of a table: its number (part of its document's name), its place for messages, and its columns."""

    number: int
    where: str
    values: Mapping[str, Any]


def read_rows(path: Path, table: TextFormat, stream: io.BufferedReader) -> Iterator[Row]:
    """Yield the rows of a table of any format except Parquet. Bytes that are not UTF-8 become surrogates (`surrogateescape`).

    stream: the open file. Raises UserError where it is not a table of this format.
    """
    is_list = stream.peek(64).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")
    if table == "jsonl" and not is_list:  # else a .json list with the wrong suffix
        return _jsonl_rows(path, stream)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    if table in ("json", "jsonl"):
        return _json_rows(path, text)
    return _csv_rows(path, text, "\t" if table == "tsv" else ",")


def no_such_column(where: str, text_field: str, columns: Sequence[str]) -> UserError:
    """Return the error for a table without the column `text_field`."""
    known = ", ".join(repr(column) for column in columns)
    return UserError(
        f"{where} has no column {text_field!r}{did_you_mean(text_field, columns)}; it has {known}: set text_field."
    )


def _jsonl_rows(path: Path, lines: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        where = f"{path} line {number + 1}"
        try:
            value = json.loads(line.decode("utf-8-sig", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({_reason(error)}): correct or remove the line.") from error
        yield Row(number, where, _object(value, where))


def _json_rows(path: Path, text: TextIO) -> Iterator[Row]:
    number = -1
    try:
        for number, value in enumerate(_JsonValues(text)):
            where = f"{path} row {number}"
            yield Row(number, where, _object(value, where))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} row {number + 1} is not JSON ({_reason(error)}): it must hold a list of rows, or rows one after the other."
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object, which names the column of the text.")
    return value


class _JsonValues:
    """An iterator over the members of a JSON list, or over concatenated values, decoded while reading. Raises ValueError."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._decoder = json.JSONDecoder()
        self._buffer, self._at, self._ended = "", 0, False

    def __iter__(self) -> Iterator[object]:
        is_list = self._next() == "["
        if is_list:
            self._at += 1
        while (character := self._next()) and not (is_list and character == "]"):
            yield self._value()
            if is_list and self._next() != "]":
                self._skip(",")
                if self._next() == "]":
                    raise ValueError("a comma before the end")
        if is_list:
            self._skip("]")
            if self._next():
                raise ValueError("more after the list")

    def _next(self) -> str:
        """Peek at the next character that is not white space; "" at the end."""
        while True:
            match = WHITE_SPACE.match(self._buffer, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._buffer) or self._ended:
                return self._buffer[self._at : self._at + 1]
            self._read()

    def _skip(self, character: str) -> None:
        if self._next() != character:
            raise ValueError(f"no {character} where it must be")
        self._at += 1

    def _value(self) -> object:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - NEAR_THE_END
                if self._ended or not cut_off:
                    raise
            else:
                if end < len(self._buffer) or self._ended or isinstance(value, dict):  # a number may go on
                    self._at = end
                    return value
            self._read()

    def _read(self) -> None:
        """Double the buffer, so that a long row is decoded only a logarithmic number of times."""
        waiting = self._buffer[self._at :]
        if len(waiting) > LONGEST_ROW:
            raise ValueError(f"longer than {LONGEST_ROW:,} characters")
        more = self._text.read(max(JSON_CHARACTERS, len(waiting)))
        self._buffer, self._at, self._ended = waiting + more, 0, not more


def _csv_rows(path: Path, text: TextIO, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV; missing cells are None. Raises UserError for more cells than the header: text may be cut."""
    csv.field_size_limit(CSV_FIELD_CHARACTERS)
    first = text.readline()
    if delimiter not in first:  # as in locales with decimal commas
        delimiter = next((other for other in OTHER_DELIMITERS if other in first), delimiter)
    rows = csv.reader(chain([first], text), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        for number, cells in enumerate(rows):
            if len(cells) > len(header):
                raise UserError(
                    f"{path} line {rows.line_num} has {len(cells)} cells where the header names {len(header)}: text that "
                    f"contains {delimiter!r} must be in double quotes."
                )
            if cells:
                yield Row(number, f"{path} row {number}", dict(zip_longest(header, cells)))
    except csv.Error as error:
        raise UserError(
            f"{path} line {rows.line_num} is not CSV ({error}): quotes inside double-quoted text must be doubled."
        ) from error


def read_parquet_rows(path: Path, columns: Sequence[str], on_read: OnRead, beside: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a Parquet file, with those of the `columns` and of the further ones (`beside`) that it has.

    Bytes that are not UTF-8 become surrogates (`surrogateescape`). Raises UserError where it has none of the `columns`.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with _seekable(path, on_read) as file, pyarrow.parquet.ParquetFile(file) as table:
            found = table.schema_arrow.names
            wanted = [column for column in columns if column in found]
            if not wanted:
                raise no_such_column(str(path), columns[0], found)
            report = _report_by_rows(table.metadata.num_rows, path.stat().st_size, on_read) if file == path else None
            number = 0
            also = [column for column in beside if column in found]
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[*wanted, *also]):
                for values in _as_bytes(batch).to_pylist():
                    text = {name: _decoded(value) for name, value in values.items()}
                    yield Row(number, f"{path} row {number}", text)
                    number += 1
                if report is not None:
                    report(number)
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error}).") from error


def _as_bytes(batch: Any) -> Any:
    """Cast the text of a batch to bytes, because pyarrow rejects a whole batch for one text that is not UTF-8."""
    import pyarrow

    binary = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    columns = [column.cast(binary.get(column.type, column.type)) for column in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _decoded(value: object) -> object:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


@contextmanager
def _seekable(path: Path, on_read: OnRead) -> Iterator[Path | IO[bytes]]:
    """Yield the file, or its content decompressed into a temporary file, since Parquet is read from its end."""
    if path.suffix.lower() not in CODECS:
        refuse_pointer(path)
        yield path
        return
    with tempfile.TemporaryFile() as plain, open_stream(path, on_read) as stream:
        shutil.copyfileobj(stream, plain)
        yield plain


def _report_by_rows(rows: int, size_bytes: int, on_read: OnRead) -> Callable[[int], None]:
    """Return a callback that takes the rows read so far and calls `on_read` with the same share of the file's bytes."""
    reported_bytes = 0

    def report(row: int) -> None:
        nonlocal reported_bytes
        on_read(row * size_bytes // rows - reported_bytes)
        reported_bytes = row * size_bytes // rows

    return report
