"""Notes about the text that are printed before a model is trained on it: repetition, overlap, length, padding."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from slimqwen.core.progress import say
from slimqwen.data.mixture import MixedStream
from slimqwen.data.store import TokenManifest
from slimqwen.data.stream import RowStream, StoredRows

# Epochs over the same text up to which each is worth about as much as new text: Muennighoff et al., "Scaling
# Data-Constrained Language Models" (arXiv 2305.16264).
WORTHWHILE_EPOCHS = 4.0


def announce(stream: RowStream, rows: int, device_type: str) -> None:
    """Print what training on `rows` rows draws from each source, how often it repeats the text, and what padding costs."""
    if isinstance(stream, MixedStream):
        for name, part in stream.streams.items():
            epochs = rows * stream.row_shares[name] / part.rows_per_epoch
            say(f"{name}: {stream.token_shares[name]:.1%} of the training tokens, {epochs:.3g} times its text")
    for note in notes_of_passes(stream, rows):
        say(note)
    if stream.padding_fraction > 0:
        say(
            f"data.documents is 'isolated': one document per row, so {stream.padding_fraction:.1%} of the positions are "
            "padding, which is computed but not trained on"
        )
        if device_type == "cuda" and find_spec("fla") is not None:
            say("flash-linear-attention can isolate packed documents without padding; slimqwen does not use that yet")


def notes_of_passes(stream: RowStream, rows: int) -> list[str]:
    """Return a note for each source that training on `rows` rows repeats more often than is worthwhile."""
    parts: Mapping[str, StoredRows] = {}
    shares: Mapping[str, float] = {}
    if isinstance(stream, MixedStream):
        parts, shares = stream.streams, stream.row_shares
    elif isinstance(stream, StoredRows):
        parts, shares = {"the training text": stream}, {"the training text": 1.0}
    epochs = {name: rows * shares[name] / part.rows_per_epoch for name, part in parts.items()}
    return [
        f"note: {name} has {part.tokens.total_tokens:,} tokens and is read {epochs[name]:.3g} times: after about "
        f"{WORTHWHILE_EPOCHS:g} epochs repeated text adds little; add text, or train on fewer tokens"
        for name, part in parts.items()
        if epochs[name] > WORTHWHILE_EPOCHS
    ]


def notes_of_overlap(manifest: TokenManifest) -> list[str]:
    """Return a note where held-out text is also training text."""
    if not manifest.heldout_in_training:
        return []
    return [
        f"note: {manifest.heldout_in_training:,} of {manifest.heldout.documents:,} held-out documents are training documents "
        "too, word for word: measurements on them say little about new text"
    ]


def notes_of_length(config: Mapping[str, Any], sequence_length: int) -> list[str]:
    """Return a note where sequences are longer than the model's context."""
    context = context_of(config)
    if context is None or sequence_length <= context:
        return []
    return [
        f"note: sequences of {sequence_length:,} tokens are longer than the model's context of {context:,} "
        "(max_position_embeddings), and it has learnt no positions beyond that: use shorter sequences"
    ]


def context_of(config: Mapping[str, Any]) -> int | None:
    """Return the model's context in tokens: `max_position_embeddings`, or the length that its RoPE is scaled to."""
    context = config.get("max_position_embeddings")
    if not isinstance(context, int):
        return None
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    if not isinstance(factor, int | float) or scaling.get("rope_type", scaling.get("type")) == "default":
        return context
    original = scaling.get("original_max_position_embeddings")
    return max(context, int(factor * (original if isinstance(original, int) else context)))
