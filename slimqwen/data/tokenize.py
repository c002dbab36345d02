"""The tokens stage: text in, a folder of packed tokens out.

train.bin, train.idx        training documents, each followed by one end-of-text token
heldout.bin, heldout.idx    documents that no training ever sees
manifest.json               what the folder holds and what it was made from: `TokenManifest`
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from slimqwen.artifacts import atomic_folder, check_replaceable, fingerprint, write_json
from slimqwen.data.packed import PackedWriter
from slimqwen.data.sources import OnSkip, check_source, documents, is_heldout
from slimqwen.data.tokenizer import load_tokenizer
from slimqwen.errors import UserError
from slimqwen.progress import Progress
from slimqwen.recipe import Source

FORMAT = "slimqwen.tokens/1"
BATCH_CHARACTERS = 2_000_000  # text encoded at one time; the encoder needs about 100 bytes per token meanwhile

Split = Literal["train", "heldout"]


class SplitCounts(BaseModel):
    """The size of one split."""

    model_config = ConfigDict(extra="forbid")

    documents: int = 0
    tokens: int = 0  # one end-of-text token per document included
    text_bytes: int = 0  # UTF-8, end-of-text not counted: what bits per byte divide by


class TokenManifest(BaseModel):
    """What a folder of tokens holds, and what it was made from."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["slimqwen.tokens/1"]
    tokenizer_fingerprint: str  # of tokenizer.json: the model must have been trained with the same one
    vocab_size: int  # largest id the tokenizer can produce, plus one
    eos_token_id: int
    train: SplitCounts
    heldout: SplitCounts
    skipped_documents: int  # empty or not UTF-8
    sources: list[Source]
    heldout_sources: list[Source]
    heldout_fraction: float


def tokenize(
    sources: Sequence[Source],
    tokenizer: Path,
    out: Path,
    *,
    heldout_sources: Sequence[Source] = (),
    heldout_fraction: float = 0.05,
    title: str = "tokens",
) -> TokenManifest:
    """Encode every document with the tokenizer in the folder `tokenizer` and write the folder `out`, all or nothing.

    Held out are the documents of `heldout_sources`; where there are none, the share `heldout_fraction` of `sources`,
    by a hash of each document's name. No special tokens are added but one eos after each document; special tokens
    that the text itself spells out are recognised, as in text rendered with a chat template. Memory is bounded
    by BATCH_CHARACTERS or the largest document, whichever is more.

    Raises `UserError`: what `documents` and `load_tokenizer` raise, a tokenizer without eos, an empty split.
    """
    for source in [*sources, *heldout_sources]:
        check_source(source)
    check_replaceable(out, tokenizer, *(s.path for s in [*sources, *heldout_sources] if s.path is not None))
    encoder = load_tokenizer(tokenizer)
    if encoder.eos_token_id is None:
        raise UserError(f"the tokenizer in {tokenizer} has no eos token, which must separate documents: set eos_token.")
    eos_token_id = int(encoder.eos_token_id)
    vocab_size = max(encoder.get_vocab().values()) + 1

    counts = {"train": SplitCounts(), "heldout": SplitCounts()}
    skipped = 0

    def count_skipped(name: str, reason: str) -> None:
        nonlocal skipped
        skipped += 1

    texts = _texts(sources, heldout_sources, heldout_fraction, count_skipped)
    with atomic_folder(out) as folder:
        with (
            Progress(title, total=None, unit="tokens") as progress,
            PackedWriter(folder / "train", vocab_size) as train,
            PackedWriter(folder / "heldout", vocab_size) as heldout,
        ):
            writers = {"train": train, "heldout": heldout}
            for batch in _batches(texts):
                batch_ids = encoder([text for _, text in batch], add_special_tokens=False, verbose=False)["input_ids"]
                for (split, text), ids in zip(batch, batch_ids, strict=True):
                    writers[split].add([*ids, eos_token_id])
                    counts[split].documents += 1
                    counts[split].tokens += len(ids) + 1
                    counts[split].text_bytes += len(text.encode("utf-8"))
                tokens_done = sum(len(ids) + 1 for ids in batch_ids)
                progress.advance(tokens_done, documents=sum(split.documents for split in counts.values()))
        _check_not_empty(counts["train"], counts["heldout"], heldout_fraction)
        manifest = TokenManifest(
            format=FORMAT,
            tokenizer_fingerprint=fingerprint(tokenizer / "tokenizer.json"),
            vocab_size=vocab_size,
            eos_token_id=eos_token_id,
            train=counts["train"],
            heldout=counts["heldout"],
            skipped_documents=skipped,
            sources=list(sources),
            heldout_sources=list(heldout_sources),
            heldout_fraction=heldout_fraction,
        )
        write_json(folder / "manifest.json", manifest.model_dump(mode="json"))
    return manifest


def load_manifest(folder: Path) -> TokenManifest:
    """The manifest of a folder of tokens; `UserError` where it is missing or not one."""
    path = folder / "manifest.json"
    try:
        return TokenManifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): is {folder} a folder of tokens?") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is not a manifest of {FORMAT} ({where or 'whole file'}: {first['msg']}).") from error


def check_vocabulary(manifest: TokenManifest, tokens: Path, checkpoint: Path, vocab_size: int) -> None:
    """Raise `UserError` unless the tokens in the folder `tokens` were made with the checkpoint's tokenizer."""
    if manifest.vocab_size > vocab_size:
        raise UserError(
            f"{tokens} was made with a tokenizer of {manifest.vocab_size:,} tokens, but {checkpoint} has "
            f"{vocab_size:,}: run `slimqwen tokens` again with this checkpoint's tokenizer."
        )
    tokenizer = checkpoint / "tokenizer.json"
    if tokenizer.is_file() and manifest.tokenizer_fingerprint != fingerprint(tokenizer):
        raise UserError(
            f"{tokens} was made with another tokenizer than the one in {checkpoint}: run `slimqwen tokens` again with it."
        )


def _texts(
    sources: Iterable[Source],
    heldout_sources: Sequence[Source],
    heldout_fraction: float,
    on_skip: OnSkip,
) -> Iterator[tuple[Split, str]]:
    """Every document's text with the split it belongs to."""
    for source in sources:
        for document in documents(source, on_skip):
            heldout = not heldout_sources and is_heldout(document.name, heldout_fraction)
            yield ("heldout" if heldout else "train"), document.text
    for source in heldout_sources:
        for document in documents(source, on_skip):
            yield "heldout", document.text


def _batches(texts: Iterable[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    """Lists of at least BATCH_CHARACTERS of text, the last one excepted."""
    batch: list[tuple[Split, str]] = []
    characters = 0
    for split, text in texts:
        batch.append((split, text))
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_not_empty(train: SplitCounts, heldout: SplitCounts, heldout_fraction: float) -> None:
    if heldout.documents == 0:
        raise UserError(
            f"of {train.documents} documents none falls into the held-out share {heldout_fraction:g}: "
            "name held-out text in heldout_sources, or raise heldout_fraction."
        )
    if train.documents == 0:
        raise UserError(
            f"all {heldout.documents} documents fall into the held-out share {heldout_fraction:g}: "
            "name held-out text in heldout_sources, or lower heldout_fraction."
        )
