"""The format of a folder of tokens, which `tokenize` writes and the other stages read.

manifest.json               content and origin of the folder: `TokenManifest`
train.bin, train.idx        training documents, each followed by one separator
heldout.bin, heldout.idx    documents that are never trained on

A mixture has the training documents of each source in a folder of its own, NAME/train.bin, NAME/train.idx and
NAME/manifest.json, which is itself a folder of tokens, except for the held-out ones, which are together in the parent.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from slimqwen.artifacts.json_file import load_model
from slimqwen.checkpoint.identity import vocabulary_fingerprint
from slimqwen.core.errors import UserError
from slimqwen.data.isolated import DocumentStream
from slimqwen.data.mixture import MixedStream
from slimqwen.data.packed import PackedTokens
from slimqwen.data.sources import NAME
from slimqwen.data.stream import RowStream, StoredRows, TokenStream
from slimqwen.recipe import DocumentBoundaries, PositiveFloat, Source

FORMAT = "slimqwen.tokens/1"
MANIFEST = "manifest.json"


class SplitCounts(BaseModel):
    """The size of one split."""

    model_config = ConfigDict(extra="forbid")

    documents: int = 0
    tokens: int = 0  # including the special tokens around each document
    text_bytes: int = 0  # UTF-8, special tokens around documents not counted: what bits per byte divide by; 0 for token ids made elsewhere

    def __add__(self, other: "SplitCounts") -> "SplitCounts":
        return SplitCounts(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            text_bytes=self.text_bytes + other.text_bytes,
        )


class Skipped(BaseModel):
    """Documents that were left out for one reason."""

    model_config = ConfigDict(extra="forbid")

    documents: int
    first: str  # its name


class TokenManifest(BaseModel):
    """The content and origin of a folder of tokens."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["slimqwen.tokens/1"]
    tokenizer_fingerprint: str  # `vocabulary_fingerprint`: the model must have been trained with the same one
    vocab_size: int  # largest id the tokenizer can produce, plus one
    bos_token_ids: list[int] = []  # before each document, where the tokenizer begins a text with them
    eos_token_id: int  # the separator, after each document
    train: SplitCounts
    heldout: SplitCounts
    heldout_in_training: int = 0  # held-out documents that are also training documents; an estimate for very many
    skipped_documents: int  # empty or not UTF-8
    skipped: dict[str, Skipped] = {}  # the same by reason
    sources: list[Source]
    heldout_sources: list[Source]
    heldout_fraction: float
    # Of a mixture: the folder of each of `sources`, in that order, with its weight in the training tokens (of any sum).
    mixture: dict[Annotated[str, Field(pattern=f"^{NAME.pattern}$")], PositiveFloat] = {}


def load_manifest(folder: Path) -> TokenManifest:
    """Load the manifest of a folder of tokens. Raises `UserError` where it is missing or invalid."""
    advice = f"is {folder} a folder of tokens?"
    return load_model(folder / MANIFEST, TokenManifest, what=f"a manifest of {FORMAT}", advice=advice)


def check_vocabulary(manifest: TokenManifest, tokens: Path, checkpoint: Path, vocab_size: int) -> None:
    """Raise `UserError` unless the tokens in the folder `tokens` were made with the checkpoint's tokenizer."""
    if manifest.vocab_size > vocab_size:
        raise UserError(
            f"{tokens} was made with a tokenizer of {manifest.vocab_size:,} tokens, but {checkpoint} has "
            f"{vocab_size:,}: run `slimqwen tokens` again with this checkpoint's tokenizer."
        )
    if vocabulary_fingerprint(checkpoint) not in (None, manifest.tokenizer_fingerprint):
        raise UserError(
            f"{tokens} was made with another tokenizer than the one in {checkpoint}, or by an earlier version of slimqwen: "
            "run `slimqwen tokens` again with this checkpoint's tokenizer."
        )


def training_stream(
    folder: Path, sequence_length: int, seed: int, documents: DocumentBoundaries = "packed"
) -> RowStream:
    """Open the training text of a folder of tokens, mixed by weight where it has several sources."""
    mixture = load_manifest(folder).mixture
    if not mixture:
        return _open_rows(folder / "train", sequence_length, seed, documents)
    streams = {name: _open_rows(folder / name / "train", sequence_length, seed, documents) for name in mixture}
    return MixedStream(streams, mixture)


def heldout_stream(folder: Path, sequence_length: int, documents: DocumentBoundaries = "packed") -> StoredRows:
    """Open the held-out text of a folder of tokens, which is read in order."""
    return _open_rows(folder / "heldout", sequence_length, 0, documents)


def _open_rows(prefix: Path, sequence_length: int, seed: int, documents: DocumentBoundaries) -> StoredRows:
    stream = DocumentStream if documents == "isolated" else TokenStream
    return stream(PackedTokens(prefix), sequence_length, seed)
