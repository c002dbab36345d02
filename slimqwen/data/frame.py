"""The special tokens around each document: those that the tokenizer adds, and the separator."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimqwen.core.errors import UserError, did_you_mean, shown
from slimqwen.core.progress import say
from slimqwen.core.warning import warn
from slimqwen.data.tokenizer import load_tokenizer
from slimqwen.data.worker import Frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The tokens that released models use for the end of a turn, and of a text.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end|>", "<end_of_turn>")
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")


def choose_frame(tokenizer: "PreTrainedTokenizerFast", folder: Path, separator: str | None) -> Frame:
    """Choose the special tokens around each document for a model with this tokenizer, and print them.

    They are those that the tokenizer adds when it encodes a text with special tokens, followed by the separator unless
    they end with it: the token `separator`, or by default the tokenizer's eos. If that eos only ends a turn of the chat
    template, a token that ends a text is used instead.

    Raises UserError for a separator that is not one token, and where there is none.
    """
    token = _choose_separator(tokenizer, folder, separator)
    number = tokenizer.convert_tokens_to_ids(token)
    before, after = _special_tokens_around(tokenizer)
    if before:
        words = " ".join(tokenizer.convert_ids_to_tokens(before))
        say(f"each document begins with {words}, as this tokenizer begins every text")
    return Frame(before, after if after[-1:] == [number] else [*after, number])


def _special_tokens_around(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after a text."""
    plain = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    return [], []


def _choose_separator(tokenizer: "PreTrainedTokenizerFast", folder: Path, named: str | None) -> str:
    if named is not None:
        token = separator_token(tokenizer, folder, named)
        say(f"documents are separated by {named!r}, as requested")
        return token
    vocabulary = tokenizer.get_vocab()
    eos: str | None = tokenizer.eos_token
    if eos is None:
        raise UserError(
            f"the tokenizer in {folder} has no eos token to separate documents with: set eos_token, or name a token as data.separator."
        )
    if eos not in TEXT_ENDS and _ends_a_turn(eos, tokenizer):
        for token, why in _ends_of_text(tokenizer, folder):
            if token in vocabulary and not _ends_a_turn(token, tokenizer):
                warn(
                    f"note: documents are separated by {token!r}, {why}; the tokenizer's eos, {eos!r}, ends a turn of a "
                    "conversation (name another by data.separator or --separator)"
                )
                return token
    say(f"documents are separated by {eos!r}, the tokenizer's eos")
    return eos


def separator_token(tokenizer: "PreTrainedTokenizerFast", folder: Path, named: str) -> str:
    """Find the token that a recipe or option names, by its entry in the vocabulary or by its text (a line break is "Ċ").

    Raises UserError for text that is cut into several tokens, or into none.
    """
    if named in tokenizer.get_vocab():
        return named
    ids = tokenizer.backend_tokenizer.encode(named, add_special_tokens=False).ids
    if len(ids) == 1 and tokenizer.decode(ids) == named:
        return str(tokenizer.convert_ids_to_tokens(ids[0]))
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    raise UserError(
        f"data.separator {shown(named)} is not a token of the tokenizer in {folder}{did_you_mean(named, special)}, which cuts it into "
        f"{len(ids)}: name one that is a single token; its special tokens are {', '.join(map(shown, special)) or 'none'}."
    )


def check_separator(folder: Path, named: str | None) -> None:
    """Raise UserError early where `choose_frame` would reject the named separator."""
    if named is not None:
        separator_token(load_tokenizer(folder), folder, named)


def _ends_a_turn(token: str, tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Return whether it is a known end of a turn, or occurs in the chat template."""
    template = tokenizer.chat_template
    return token in TURN_ENDS or token in (template if isinstance(template, str) else str(template or ""))


def _ends_of_text(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> Iterator[tuple[str, str]]:
    """Yield tokens that may end a text for the model, and the evidence, the likeliest first."""
    for file in ("generation_config.json", "config.json"):
        for number in _eos_ids(folder / file):
            yield str(tokenizer.convert_ids_to_tokens(number)), f"an end of text in {file}"
    for token in TEXT_ENDS:
        yield token, "which ends a text by its name"


def _eos_ids(path: Path) -> list[int]:
    """Read `eos_token_id` of a config, its text model's in a multimodal one; none where it cannot be read."""
    try:
        config: Any = json.loads(path.read_bytes())
        ids = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    except (OSError, ValueError, RecursionError, AttributeError):
        return []
    return [number for number in (ids if isinstance(ids, list) else [ids]) if isinstance(number, int)]
