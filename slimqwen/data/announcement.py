"""What a person should know about the text before a model is trained on it."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from slimqwen.core.progress import say
from slimqwen.data.mixture import MixedStream
from slimqwen.data.store import TokenManifest
from slimqwen.data.stream import RowStream, StoredRows

# Passes over the same text up to which each is worth about as much as new text: Muennighoff et al., "Scaling
# Data-Constrained Language Models" (arXiv 2305.16264).
WORTHWHILE_PASSES = 4.0


def announce(stream: RowStream, rows: int, device_type: str) -> None:
    """Say what training on `rows` rows draws from each source, how often it reads the text, and what padding costs."""
    if isinstance(stream, MixedStream):
        for name, part in stream.streams.items():
            passes = rows * stream.row_shares[name] / part.rows_per_epoch
            say(f"{name}: {stream.token_shares[name]:.1%} of the training tokens, {passes:.3g} times its text")
    for note in notes_of_passes(stream, rows):
        say(note)
    if stream.padding_fraction > 0:
        say(
            f"data.documents is 'isolated': one document to a row, so {stream.padding_fraction:.1%} of the positions are "
            "padding, which is computed and counts for nothing"
        )
        if device_type == "cuda" and find_spec("fla") is not None:
            say(
                "flash-linear-attention could keep packed documents apart without padding; slimqwen doesn't do that yet"
            )


def notes_of_passes(stream: RowStream, rows: int) -> list[str]:
    """A sentence for each source that training on `rows` rows reads more often than is worthwhile."""
    parts: Mapping[str, StoredRows] = {}
    shares: Mapping[str, float] = {}
    if isinstance(stream, MixedStream):
        parts, shares = stream.streams, stream.row_shares
    elif isinstance(stream, StoredRows):
        parts, shares = {"the training text": stream}, {"the training text": 1.0}
    passes = {name: rows * shares[name] / part.rows_per_epoch for name, part in parts.items()}
    return [
        f"note: {name} has {part.tokens.total_tokens:,} tokens and is read {passes[name]:.3g} times: after about "
        f"{WORTHWHILE_PASSES:g} passes a text has little more to teach; add text, or train on fewer tokens"
        for name, part in parts.items()
        if passes[name] > WORTHWHILE_PASSES
    ]


def notes_of_overlap(manifest: TokenManifest) -> list[str]:
    """A sentence where held-out text is trained on."""
    if not manifest.heldout_in_training:
        return []
    return [
        f"note: {manifest.heldout_in_training:,} of {manifest.heldout.documents:,} held-out documents are training documents "
        "too, word for word: what is measured on them says little of new text"
    ]


def notes_of_length(config: Mapping[str, Any], sequence_length: int) -> list[str]:
    """A sentence where sequences are longer than the context that the model of this config was made for."""
    context = context_of(config)
    if context is None or sequence_length <= context:
        return []
    return [
        f"note: sequences of {sequence_length:,} tokens are longer than the model's context of {context:,} "
        "(max_position_embeddings): it has not learnt positions beyond it; use shorter sequences"
    ]


def context_of(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest text that a model is made for: `max_position_embeddings`, or what its RoPE is scaled to."""
    context = config.get("max_position_embeddings")
    if not isinstance(context, int):
        return None
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    if not isinstance(factor, int | float) or scaling.get("rope_type", scaling.get("type")) == "default":
        return context
    original = scaling.get("original_max_position_embeddings")
    return max(context, int(factor * (original if isinstance(original, int) else context)))
