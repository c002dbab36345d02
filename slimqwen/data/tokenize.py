"""The tokens stage: text in, a folder of packed tokens out (`slimqwen.data.store` says what is in it)."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from slimqwen.artifacts import atomic_folder, makes_folder, write_json
from slimqwen.checkpoint.identity import vocabulary_fingerprint
from slimqwen.data.encode import Text, TextBatch, encode_in_order, usable_cores
from slimqwen.data.packed import PackedTokens, PackedWriter, bin_path, idx_path
from slimqwen.data.sources import check_sources, describe, documents, is_heldout, is_mixture, name_of, size_bytes
from slimqwen.data.store import FORMAT, MANIFEST, SplitCounts, TokenManifest
from slimqwen.data.tokenizer import load_tokenizer
from slimqwen.data.worker import Ids
from slimqwen.errors import UserError
from slimqwen.progress import Progress
from slimqwen.recipe import Source

BATCH_CHARACTERS = 1_000_000  # text encoded at one time; the encoder needs about 100 bytes per token meanwhile
HELDOUT = "heldout"

# Fields of DataRecipe that do not change what is written.
FIELDS_WITHOUT_EFFECT = {"sequence_length", "documents", "workers"}


@makes_folder("tokenizer", "sources", "heldout_sources")
def tokenize(
    sources: Sequence[Source],
    tokenizer: Path,
    out: Path,
    *,
    heldout_sources: Sequence[Source] = (),
    heldout_fraction: float = 0.05,
    workers: int | None = None,
    title: str = "tokens",
) -> TokenManifest:
    """Encode every document with the tokenizer in the folder `tokenizer` and write the folder `out`, all or nothing.

    Held out are the documents of `heldout_sources`; where there are none, the share `heldout_fraction` of `sources`,
    by a hash of each document's name. No special tokens are added but one eos after each document; special tokens
    that the text itself spells out are recognised, as in text rendered with a chat template.

    Sources with weights, and token ids made elsewhere, are kept apart in folders of their own, and the manifest says how
    they are mixed. Token ids made elsewhere are read once, to compare them with the vocabulary, and linked to.

    Memory is bounded by two batches of BATCH_CHARACTERS, or of one larger document, for each of the `workers`: processes,
    one per usable core by default. What is written does not depend on their number.

    Raises `UserError`: what `check_sources`, `documents` and `load_tokenizer` raise, a tokenizer without eos, an empty
    split, token ids outside the vocabulary.
    """
    check_sources(sources, heldout_sources)
    everything = [*sources, *heldout_sources]
    encoder = load_tokenizer(tokenizer)
    if encoder.eos_token_id is None:
        raise UserError(f"the tokenizer in {tokenizer} has no eos token, which must separate documents: set eos_token.")
    eos_token_id = int(encoder.eos_token_id)
    vocab_size = max(encoder.get_vocab().values()) + 1
    encoder.backend_tokenizer.no_truncation()  # which a tokenizer.json may ask for
    encoder.backend_tokenizer.no_padding()

    prefixes = [f"{name_of(source)}/train" if is_mixture(sources) else "train" for source in sources]
    reader = _Reader(zip(prefixes, sources, strict=True), heldout_sources, heldout_fraction)
    encoded = encode_in_order(reader.batches(), encoder.backend_tokenizer, eos_token_id, workers or usable_cores())
    tokenizer_fingerprint = vocabulary_fingerprint(tokenizer)
    assert tokenizer_fingerprint is not None, "a tokenizer was loaded from there"
    with atomic_folder(out) as folder:
        for prefix in prefixes:
            (folder / prefix).parent.mkdir(exist_ok=True)
        with Progress(title, total=sum(map(size_bytes, everything)), unit="bytes") as progress, closing(encoded):
            counts = {
                prefix: _link(source.megatron, folder / prefix, vocab_size, progress)
                for prefix, source in zip(prefixes, sources, strict=True)
                if source.megatron is not None
            }
            text_prefixes = [prefix for prefix in (*prefixes, HELDOUT) if prefix not in counts]
            counts |= _pack(encoded, folder, text_prefixes, vocab_size, progress)
        trains = [counts[prefix] for prefix in dict.fromkeys(prefixes)]
        _check_not_empty(sources, trains, counts[HELDOUT], heldout_fraction)
        manifest = TokenManifest(
            format=FORMAT,
            tokenizer_fingerprint=tokenizer_fingerprint,
            vocab_size=vocab_size,
            eos_token_id=eos_token_id,
            train=sum(trains, SplitCounts()),
            heldout=counts[HELDOUT],
            skipped_documents=reader.skipped.total(),
            sources=list(sources),
            heldout_sources=list(heldout_sources),
            heldout_fraction=heldout_fraction,
            mixture=_weights(sources, trains) if is_mixture(sources) else {},
        )
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
        for name, source, train in zip(manifest.mixture, sources, trains, strict=False):
            own = {"train": train, "heldout": SplitCounts(), "sources": [source], "mixture": {}}
            own |= {"skipped_documents": reader.skipped[f"{name}/train"]}
            write_json(folder / name / MANIFEST, manifest.model_copy(update=own).model_dump(mode="json"))
    return manifest


class _Reader:
    """The text of all sources that are text, and what was left out of it so far.

    sources: with the prefix of the files that each belongs into.
    """

    def __init__(
        self, sources: Iterable[tuple[str, Source]], heldout_sources: Sequence[Source], heldout_fraction: float
    ) -> None:
        self.skipped: Counter[str] = Counter()  # documents by prefix
        self._read_bytes = 0
        self._sources = [(prefix, source) for prefix, source in sources if source.megatron is None]
        self._heldout_sources = heldout_sources
        self._heldout_fraction = heldout_fraction

    def batches(self) -> Iterator[TextBatch]:
        """Every document, BATCH_CHARACTERS of text at a time or more, but for the last batch."""
        texts: list[Text] = []
        characters = 0
        for text in self._texts():
            texts.append(text)
            characters += len(text.text)
            if characters >= BATCH_CHARACTERS:
                yield TextBatch(texts, self._read_bytes)
                texts, characters = [], 0
        yield TextBatch(texts, self._read_bytes)

    def _texts(self) -> Iterator[Text]:
        for prefix, source in self._sources:
            for document in documents(source, partial(self._skip, prefix), self._read):
                heldout = not self._heldout_sources and is_heldout(document.name, self._heldout_fraction)
                yield Text(HELDOUT if heldout else prefix, document.text)
        for source in self._heldout_sources:
            for document in documents(source, partial(self._skip, HELDOUT), self._read):
                yield Text(HELDOUT, document.text)

    def _skip(self, prefix: str, name: str, reason: str) -> None:
        self.skipped[prefix] += 1

    def _read(self, size_bytes: int) -> None:
        self._read_bytes += size_bytes


def _pack(
    encoded: Iterator[tuple[TextBatch, list[Ids]]],
    folder: Path,
    prefixes: Sequence[str],
    vocab_size: int,
    progress: Progress,
) -> dict[str, SplitCounts]:
    """Write each document into the files that it belongs into; the size of each by prefix."""
    counts = {prefix: SplitCounts() for prefix in prefixes}
    shown_bytes = 0
    with ExitStack() as files:
        writers = {prefix: files.enter_context(PackedWriter(folder / prefix, vocab_size)) for prefix in counts}
        for batch, batch_ids in encoded:
            for (prefix, text), ids in zip(batch.texts, batch_ids, strict=True):
                writers[prefix].add(ids)
                counts[prefix].documents += 1
                counts[prefix].tokens += len(ids)
                counts[prefix].text_bytes += len(text.encode("utf-8"))
            total = sum(counts.values(), SplitCounts())
            progress.advance(batch.read_bytes - shown_bytes, documents=total.documents, tokens=total.tokens)
            shown_bytes = batch.read_bytes
    return counts


def _link(megatron: Path, prefix: Path, vocab_size: int, progress: Progress) -> SplitCounts:
    """Token ids made elsewhere, checked and linked to from `prefix`."""
    tokens = PackedTokens(megatron)
    tokens.check_ids(vocab_size, progress.advance)
    for path_of in (bin_path, idx_path):
        path_of(prefix).symlink_to(path_of(megatron).resolve())
    return SplitCounts(documents=tokens.documents, tokens=tokens.total_tokens)


def _weights(sources: Sequence[Source], trains: Sequence[SplitCounts]) -> Mapping[str, float]:
    """By name; where no weights are given, as many tokens as there are."""
    return {
        name_of(source): source.weight or float(train.tokens) for source, train in zip(sources, trains, strict=True)
    }


def _check_not_empty(
    sources: Sequence[Source], trains: Sequence[SplitCounts], heldout: SplitCounts, heldout_fraction: float
) -> None:
    if heldout.documents == 0:
        raise UserError(
            f"of {sum(trains, SplitCounts()).documents} documents none falls into the held-out share {heldout_fraction:g}: "
            "name held-out text in heldout_sources, or raise heldout_fraction."
        )
    for number, train in enumerate(trains):
        if train.documents == 0:
            whose = describe(sources[number]) if len(trains) > 1 else ", ".join(map(describe, sources))
            raise UserError(
                f"all documents of {whose} fall into the held-out share {heldout_fraction:g}: "
                "name held-out text in heldout_sources, or lower heldout_fraction."
            )
