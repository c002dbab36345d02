"""The documents of one file: a text, or a table with one document per row."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimqwen.checkpoint.config import refuse_pointer
from slimqwen.core.errors import UserError, shown
from slimqwen.data.chat import CHAT_COLUMNS, TOOLS, ChatTemplate, is_chat, parse_messages, parse_tools
from slimqwen.data.formats import OnRead, is_utf16, open_stream, why_not_utf8
from slimqwen.data.rows import Row, no_such_column, read_parquet_rows, read_rows
from slimqwen.recipe import Source, TextFormat

OnSkip = Callable[[str, str], None]  # called with the name of a document that is left out, and the reason

EMPTY = "empty"
DEFAULT_TEXT_FIELD = Source.model_fields["text_field"].default


@dataclass(frozen=True)
class Document:
    """A text, and the name that decides whether it is held out."""

    name: str
    text: str


class LeftOut:
    """A count of the documents that are left out, by reason, with the first name for each."""

    def __init__(self) -> None:
        self.documents: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        self.documents[reason] += 1
        self.first.setdefault(reason, printable(name))

    def __str__(self) -> str:
        """Return text such as `2 not UTF-8 but UTF-16 (the first a.txt), 1 empty (b.txt)`."""
        return ", ".join(
            f"{number:,} {reason} ({'the first ' if number > 1 else ''}{self.first[reason]})"
            for reason, number in self.documents.items()
        )


def printable(name: str) -> str:
    """Escape a name with control characters or bytes that are not characters, so that it can be printed and stored."""
    return name if name.isprintable() else repr(name)[1:-1]


@dataclass(frozen=True)
class Reading:
    """Settings for reading the files of a source.

    text_field: the column of the text. chat: renders rows of messages; None where there is no template.
    on_skip, on_read: callbacks for documents that are left out, and for bytes that were read.
    """

    text_field: str
    on_skip: OnSkip
    on_read: OnRead
    chat: ChatTemplate | None = None

    @property
    def columns(self) -> list[str]:
        """List the columns that may hold the text, in order; those of chats only with the default `text_field`."""
        return [self.text_field, *(CHAT_COLUMNS if self.text_field == DEFAULT_TEXT_FIELD else ())]


def read_documents(name: str, path: Path, text_format: TextFormat, reading: Reading) -> Iterator[Document]:
    """Yield the documents of one file, named `name` or, in a table, `name:row`, empty ones included.

    Raises UserError for a file that cannot be read, or is not of the given format.
    """
    try:
        if text_format == "parquet":
            rows = read_parquet_rows(path, reading.columns, reading.on_read, [TOOLS])
            yield from _documents_of_rows(name, rows, reading)
            return
        with open_stream(path, reading.on_read) as stream:
            if is_utf16(beginning := stream.peek(4096)[:4096]):
                reading.on_skip(name, why_not_utf8(beginning))
                while stream.read(1 << 20):  # so that `on_read` counts the whole file
                    pass
            elif text_format == "text":
                yield from _document_of_text(name, stream.read(), reading)
            else:
                yield from _documents_of_rows(name, read_rows(path, text_format, stream), reading)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _document_of_text(name: str, content: bytes, reading: Reading) -> Iterator[Document]:
    try:
        yield Document(name, content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        reading.on_skip(name, why_not_utf8(content))


def _documents_of_rows(name: str, rows: Iterator[Row], reading: Reading) -> Iterator[Document]:
    for row in rows:
        document = f"{name}:{row.number}"
        text = _extract_text(row, reading)
        reason = _why_not_encodable(text)
        if reason is None:
            yield Document(document, text)
        else:
            reading.on_skip(document, reason)


def has_text(path: Path, text_format: TextFormat, text_field: str) -> bool:
    """Return whether the first row of a table has a column of text; False where the file is not a table.

    Raises UserError for a file that cannot be read.
    """
    refuse_pointer(path)
    reading = Reading(text_field, lambda *_: None, lambda _: None)
    try:
        with open_stream(path, reading.on_read) as stream:
            row = next(read_rows(path, text_format, stream), None)
        values = {} if row is None else row.values
        return any(column in values and isinstance(values[column], str | list | None) for column in reading.columns)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UserError:
        return False


def _extract_text(row: Row, reading: Reading) -> str:
    """Return the text of a row: its text column, or its messages rendered."""
    column = _column(row.values, reading.columns)
    if column is None:
        raise no_such_column(row.where, reading.text_field, list(row.values))
    cell = row.values[column]
    if cell is None:
        return ""
    is_messages = column != reading.text_field  # one of CHAT_COLUMNS
    if isinstance(cell, str):
        messages = parse_messages(cell) if is_messages else None
        if messages is None:
            return cell
        cell = messages
    if is_chat(cell):
        if reading.chat is None:
            raise UserError(f"{row.where}: {column!r} holds messages, and there is no chat template to render them.")
        return reading.chat.render(cell, column, row.where, parse_tools(row.values.get(TOOLS)))
    what = f"{type(cell).__name__}, not text"
    if is_messages:
        what = f"{shown(cell)}, which is not a list of messages, each with role and content or from and value"
    raise UserError(f"{row.where}: {column!r} holds {what}: set text_field to the text's column.")


def _column(values: Mapping[str, Any], columns: list[str]) -> str | None:
    present = [column for column in columns if column in values]
    filled = [column for column in present if values[column] is not None]
    return next(iter(filled or present), None)


def _why_not_encodable(text: str) -> str | None:
    r"""Return why a text is not UTF-8 (invalid bytes, or a lone surrogate in JSON, "\ud800"); None where it is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return why_not_utf8(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:
            return "not UTF-8"
    return None
