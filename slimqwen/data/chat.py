"""Rows of messages as text, by the tokenizer's own chat template."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimqwen.errors import UserError, did_you_mean
from slimqwen.warning import warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_COLUMNS = ("messages", "conversations")  # the second is ShareGPT's: turns of "from" and "value"
ROLES = {  # ShareGPT's words for them, and the templates'
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
    """Whether a cell is a list of messages, each with a role and a content in either spelling."""
    return isinstance(cell, list) and all(
        isinstance(turn, dict) and ("role" in turn or ("from" in turn and "value" in turn)) for turn in cell
    )


def messages_in(cell: str) -> list[dict[str, Any]] | None:
    """The messages that a cell spells out as JSON, as those of a .csv must; None where it is text."""
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    return value if is_chat(value) else None


class ChatTemplate:
    """The template of a tokenizer, in Transformers' sandbox. That it is used is said once for each column."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
        self._tokenizer = tokenizer
        self._folder = folder
        self._told: set[str] = set()

    def render(self, messages: list[dict[str, Any]], column: str, where: str) -> str:
        """The conversation as the template writes it, without a prompt for another turn.

        Raises UserError where there is no template, it fails, or a role is unknown.
        """
        if not messages:
            return ""
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{where}: {column!r} holds messages, and the tokenizer in {self._folder} has no chat template to render "
                "them: add its chat_template.jinja, or name a column of text by text_field."
            )
        if column not in self._told:
            self._told.add(column)
            warn(
                f"note: conversations in the column {column!r} are rendered with the tokenizer's chat template; "
                "every token of them is trained on, questions too"
            )
        turns = [_turn(message, where) for message in messages]
        try:
            rendered: str = self._tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # whatever a template raises
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{where}: the tokenizer's chat template fails on this conversation ({reason}).") from error
        return rendered


def _turn(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "role" in message:  # as it is; a table fills in null where other rows have more
        return {key: value for key, value in message.items() if value is not None}
    role = str(message["from"])
    if role not in ROLES:
        raise UserError(
            f"{where}: a turn is from {role!r}{did_you_mean(role, ROLES)}; known are {', '.join(map(repr, ROLES))}."
        )
    return {"role": ROLES[role], "content": message["value"]}
