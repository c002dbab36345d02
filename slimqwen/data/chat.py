"""Rendering of rows of messages as text, by the tokenizer's own chat template."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.core.warning import warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_COLUMNS = ("messages", "conversations")  # the second is ShareGPT's: turns of "from" and "value"
TOOLS = "tools"  # the column with the descriptions of tools that an assistant may call
ROLES = {  # ShareGPT's names -> the templates'
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}


def is_chat(cell: object) -> bool:
    """Return whether a cell is a list of messages, each with a role and a content in either spelling."""
    return isinstance(cell, list) and all(
        isinstance(turn, dict) and ("role" in turn or ("from" in turn and "value" in turn)) for turn in cell
    )


def parse_messages(cell: str) -> list[dict[str, Any]] | None:
    """Parse a cell that holds messages as JSON, the only form in a .csv; None where it is text."""
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    return value if is_chat(value) else None


def parse_tools(cell: object) -> list[dict[str, Any]] | None:
    """Return the descriptions of tools in a cell, which may hold them as JSON; None where there are none."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return None
    if not isinstance(cell, list) or not cell or not all(isinstance(tool, dict) for tool in cell):
        return None
    return [_without_nulls(tool) for tool in cell]


def _without_nulls(value: Any) -> Any:
    """Remove nulls, with which a table fills the fields that only other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


class ChatTemplate:
    """The chat template of a tokenizer, run in Transformers' sandbox. Its use is announced once per column."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
        self._tokenizer = tokenizer
        self._folder = folder
        self._announced: set[str] = set()

    def render(
        self, messages: list[dict[str, Any]], column: str, where: str, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """Render a conversation with these tools, without a generation prompt.

        Raises UserError where there is no template, it fails, or a role is unknown.
        """
        if not messages:
            return ""
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{where}: {column!r} holds messages, and the tokenizer in {self._folder} has no chat template to render "
                "them: add its chat_template.jinja, or set text_field to a column of text."
            )
        if column not in self._announced:
            self._announced.add(column)
            warn(
                f"note: conversations in the column {column!r} are rendered with the tokenizer's chat template; "
                "every token of them is trained on, questions too"
            )
        turns = [_turn(message, where) for message in messages]
        try:
            rendered: str = self._tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
        except Exception as error:  # whatever a template raises
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{where}: the tokenizer's chat template fails on this conversation ({reason}).") from error
        return rendered


def _turn(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "role" in message:  # kept; nulls stand for fields that only other rows of the table have
        turn = {key: value for key, value in message.items() if value is not None}
        return turn | {"content": _joined(turn["content"])} if "content" in turn else turn
    role = str(message["from"])
    if role not in ROLES:
        raise UserError(
            f"{where}: a turn is from {role!r}{did_you_mean(role, ROLES)}; known are {', '.join(map(repr, ROLES))}."
        )
    return {"role": ROLES[role], "content": message["value"]}


def _joined(content: object) -> object:
    """Join a content made of text parts into one text, since templates of text-only models expect a string."""
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    are_all = bool(parts) and len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if are_all else content
