"""The documents of one file: text, or a table with a document in each row."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimqwen.checkpoint.config import refuse_pointer
from slimqwen.core.errors import UserError, shown
from slimqwen.data.chat import CHAT_COLUMNS, TOOLS, ChatTemplate, is_chat, messages_in, tools_in
from slimqwen.data.formats import OnRead, is_utf16, opened, why_not_utf8
from slimqwen.data.rows import Row, no_such_column, parquet_rows, rows_of_stream
from slimqwen.recipe import Source, TextFormat

OnSkip = Callable[[str, str], None]  # called with a document's name and why it was left out

EMPTY = "empty"
DEFAULT_TEXT_FIELD = Source.model_fields["text_field"].default


@dataclass(frozen=True)
class Document:
    name: str
    text: str


class LeftOut:
    """Documents that are left out: how many for each reason, and the first of them."""

    def __init__(self) -> None:
        self.documents: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        self.documents[reason] += 1
        self.first.setdefault(reason, printable(name))

    def __str__(self) -> str:
        """`2 not UTF-8 but UTF-16 (the first a.txt), 1 empty (b.txt)`"""
        return ", ".join(
            f"{number:,} {reason} ({'the first ' if number > 1 else ''}{self.first[reason]})"
            for reason, number in self.documents.items()
        )


def printable(name: str) -> str:
    """A name that can be shown and stored: what is no character, or moves a terminal's cursor, is escaped."""
    return name if name.isprintable() else repr(name)[1:-1]


@dataclass(frozen=True)
class Reading:
    """How the files of a source are read.

    text_field: the column of the text. chat: what renders rows of messages; None where there is no template to.
    on_skip, on_read: told what is left out, and the bytes that were read.
    """

    text_field: str
    on_skip: OnSkip
    on_read: OnRead
    chat: ChatTemplate | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that text is looked for in, in this order: those of chats only where nobody named another."""
        return [self.text_field, *(CHAT_COLUMNS if self.text_field == DEFAULT_TEXT_FIELD else ())]


def read_documents(name: str, path: Path, text_format: TextFormat, reading: Reading) -> Iterator[Document]:
    """The documents of one file, called `name` or, in a table, `name:row`; those without text come out empty.

    Raises UserError for a file that cannot be read, or is not what it is read as.
    """
    try:
        if text_format == "parquet":
            yield from _documents_of_rows(name, parquet_rows(path, reading.columns, reading.on_read, [TOOLS]), reading)
            return
        with opened(path, reading.on_read) as stream:
            if is_utf16(beginning := stream.peek(4096)[:4096]):
                reading.on_skip(name, why_not_utf8(beginning))
                while stream.read(1 << 20):  # which is told
                    pass
            elif text_format == "text":
                yield from _whole(name, stream.read(), reading)
            else:
                yield from _documents_of_rows(name, rows_of_stream(path, text_format, stream), reading)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _whole(name: str, content: bytes, reading: Reading) -> Iterator[Document]:
    try:
        yield Document(name, content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        reading.on_skip(name, why_not_utf8(content))


def _documents_of_rows(name: str, rows: Iterator[Row], reading: Reading) -> Iterator[Document]:
    for row in rows:
        document = f"{name}:{row.number}"
        text = _text_of(row, reading)
        reason = _why_not_encodable(text)
        if reason is None:
            yield Document(document, text)
        else:
            reading.on_skip(document, reason)


def has_text(path: Path, text_format: TextFormat, text_field: str) -> bool:
    """Whether the first row of a table has a column that text is read from; False where it is no table either.

    Raises UserError for a file that cannot be read, of which nobody knows.
    """
    refuse_pointer(path)
    reading = Reading(text_field, lambda *_: None, lambda _: None)
    try:
        with opened(path, reading.on_read) as stream:
            row = next(rows_of_stream(path, text_format, stream), None)
        values = {} if row is None else row.values
        return any(column in values and isinstance(values[column], str | list | None) for column in reading.columns)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UserError:
        return False


def _text_of(row: Row, reading: Reading) -> str:
    """The text of a row: its column as it is, or its messages rendered."""
    column = _column(row.values, reading.columns)
    if column is None:
        raise no_such_column(row.where, reading.text_field, list(row.values))
    cell = row.values[column]
    if cell is None:
        return ""
    is_messages = column != reading.text_field  # nobody named the column
    if isinstance(cell, str):
        messages = messages_in(cell) if is_messages else None
        if messages is None:
            return cell
        cell = messages
    if is_chat(cell):
        if reading.chat is None:
            raise UserError(f"{row.where}: {column!r} holds messages, and no chat template is at hand to render them.")
        return reading.chat.render(cell, column, row.where, tools_in(row.values.get(TOOLS)))
    what = f"{type(cell).__name__}, not text"
    if is_messages:
        what = f"{shown(cell)}, which is no list of messages, each with role and content or from and value"
    raise UserError(f"{row.where}: {column!r} holds {what}: set text_field to the text's column.")


def _column(values: Mapping[str, Any], columns: list[str]) -> str | None:
    present = [column for column in columns if column in values]
    filled = [column for column in present if values[column] is not None]
    return next(iter(filled or present), None)


def _why_not_encodable(text: str) -> str | None:
    """Why a text is no UTF-8: its bytes are not, or its JSON spells half of a surrogate pair, "\\ud800"."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return why_not_utf8(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:
            return "not UTF-8"
    return None
