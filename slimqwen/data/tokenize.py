"""The tokens stage: from text to a folder of packed tokens (its format: `slimqwen.data.store`)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from slimqwen.artifacts import atomic_folder, makes_folder, write_json
from slimqwen.checkpoint.identity import vocabulary_fingerprint
from slimqwen.core.errors import UserError
from slimqwen.core.progress import Progress
from slimqwen.core.warning import warn
from slimqwen.data.announcement import notes_of_overlap
from slimqwen.data.chat import ChatTemplate
from slimqwen.data.documents import LeftOut
from slimqwen.data.encode import TextBatch, encode_in_order, usable_cores
from slimqwen.data.frame import choose_frame
from slimqwen.data.packed import PackedTokens, PackedWriter, bin_path, idx_path
from slimqwen.data.reader import HELDOUT, TextReader
from slimqwen.data.sources import check_sources, describe, is_mixture, name_of, size_bytes
from slimqwen.data.store import FORMAT, MANIFEST, Skipped, SplitCounts, TokenManifest
from slimqwen.data.tokenizer import load_tokenizer
from slimqwen.data.worker import Ids
from slimqwen.recipe import Execution, Source


@makes_folder("tokenizer", "sources", "heldout_sources", kind="tokens")
def tokenize(
    sources: Sequence[Source],
    tokenizer: Path,
    out: Path,
    *,
    heldout_sources: Sequence[Source] = (),
    heldout_fraction: float = 0.05,
    separator: str | None = None,
    execution: Execution = Execution(),  # noqa: B008 - immutable
    title: str = "tokens",
) -> TokenManifest:
    """Encode every document with the tokenizer in the folder `tokenizer` and write the folder `out` atomically.

    Held out are the documents of `heldout_sources`; where there are none, the share `heldout_fraction` of `sources`
    (`divide`). Rows of messages are rendered with the tokenizer's chat template. `choose_frame` gives the special tokens
    around each document, by default the separator too; special tokens spelled out in the text are recognised. Documents that
    are left out, and held-out text that is also trained on, are reported and recorded in the manifest.

    Sources with weights, and token ids made elsewhere, have folders of their own, and the manifest has their weights.
    Token ids made elsewhere are read once, to check them against the vocabulary, and linked to.

    Memory is bounded by two batches of `reader.BATCH_CHARACTERS`, or of one larger document, for each of `execution.workers`
    (processes, by default one per usable core). The output does not depend on their number. Raises `UserError` as
    `check_sources`, `documents`, `load_tokenizer` and `choose_frame` do, and for an empty split or ids outside the vocabulary.
    """
    check_sources(sources, heldout_sources)
    encoder = load_tokenizer(tokenizer)
    encoder.backend_tokenizer.no_truncation()  # which tokenizer.json may enable
    encoder.backend_tokenizer.no_padding()
    frame = choose_frame(encoder, tokenizer, separator)
    vocab_size = max(encoder.get_vocab().values()) + 1
    prefixes = [f"{name_of(source)}/train" if is_mixture(sources) else "train" for source in sources]
    reader = TextReader(prefixes, sources, heldout_sources, heldout_fraction, ChatTemplate(encoder, tokenizer))
    encoded = encode_in_order(reader.batches(), encoder.backend_tokenizer, frame, execution.workers or usable_cores())
    fingerprint = vocabulary_fingerprint(tokenizer)
    assert fingerprint is not None, "a tokenizer that was loaded has files"
    total = _total_bytes(sources, heldout_sources)
    with atomic_folder(out) as folder:
        with Progress(title, total=total, unit="bytes") as progress, closing(encoded):
            counts = _write(sources, prefixes, encoded, folder, vocab_size, progress)
        trains = [counts[prefix] for prefix in dict.fromkeys(prefixes)]
        _check_not_empty(sources, trains, counts[HELDOUT], heldout_fraction)
        manifest = TokenManifest(
            format=FORMAT,
            tokenizer_fingerprint=fingerprint,
            vocab_size=vocab_size,
            bos_token_ids=frame.before,
            eos_token_id=frame.after[-1],
            train=sum(trains, SplitCounts()),
            heldout=counts[HELDOUT],
            heldout_in_training=min(reader.overlap.documents, counts[HELDOUT].documents),
            **_skipped_of(reader.left_out),
            sources=list(sources),
            heldout_sources=list(heldout_sources),
            heldout_fraction=heldout_fraction,
            mixture=_mixture_weights(sources, trains) if is_mixture(sources) else {},
        )
        _write_manifests(manifest, trains, reader, folder)
    _warn_about(manifest, reader.left_out)
    return manifest


def _total_bytes(sources: Sequence[Source], heldout_sources: Sequence[Source]) -> int:
    return sum(map(size_bytes, sources)) + sum(size_bytes(source, heldout=True) for source in heldout_sources)


def _warn_about(manifest: TokenManifest, left_out: LeftOut) -> None:
    """Warn of documents that were left out, and of held-out text that is also trained on."""
    if manifest.skipped_documents:
        warn(f"note: documents left out: {left_out}")
    for note in notes_of_overlap(manifest):
        warn(note)


def _write_manifests(manifest: TokenManifest, trains: Sequence[SplitCounts], reader: TextReader, folder: Path) -> None:
    """Write the manifest of the whole and, for a mixture, one in the folder of each source."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    for name, source, train in zip(manifest.mixture, manifest.sources, trains, strict=False):
        own = {"train": train, "heldout": SplitCounts(), "sources": [source], "mixture": {}}
        own |= {"heldout_in_training": 0, **_skipped_of(reader.left_out_of[f"{name}/train"])}
        write_json(folder / name / MANIFEST, manifest.model_copy(update=own).model_dump(mode="json"))


def _skipped_of(left_out: LeftOut) -> dict[str, Any]:
    """Return the manifest fields about documents that were left out."""
    skipped = {
        reason: Skipped(documents=number, first=left_out.first[reason]) for reason, number in left_out.documents.items()
    }
    return {"skipped_documents": left_out.documents.total(), "skipped": skipped}


def _write(
    sources: Sequence[Source],
    prefixes: Sequence[str],
    encoded: Iterator[tuple[TextBatch, list[Ids]]],
    folder: Path,
    vocab_size: int,
    progress: Progress,
) -> dict[str, SplitCounts]:
    """Link to the token ids made elsewhere and pack the encoded text. Returns the size of each prefix."""
    for prefix in prefixes:
        (folder / prefix).parent.mkdir(exist_ok=True)
    counts = {
        prefix: _link(source.megatron, folder / prefix, vocab_size, progress)
        for prefix, source in zip(prefixes, sources, strict=True)
        if source.megatron is not None
    }
    text_prefixes = [prefix for prefix in (*prefixes, HELDOUT) if prefix not in counts]
    return counts | _pack(encoded, folder, text_prefixes, vocab_size, progress)


def _pack(
    encoded: Iterator[tuple[TextBatch, list[Ids]]],
    folder: Path,
    prefixes: Sequence[str],
    vocab_size: int,
    progress: Progress,
) -> dict[str, SplitCounts]:
    """Write each document to the files of its prefix. Returns the size of each prefix."""
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
    """Check token ids made elsewhere, and link to them from `prefix`."""
    tokens = PackedTokens(megatron)
    tokens.check_ids(vocab_size, progress.advance)
    for path_of in (bin_path, idx_path):
        path_of(prefix).symlink_to(path_of(megatron).resolve())
    return SplitCounts(documents=tokens.documents, tokens=tokens.total_tokens)


def _mixture_weights(sources: Sequence[Source], trains: Sequence[SplitCounts]) -> Mapping[str, float]:
    """Return the weights by name; where none are given, each source's number of tokens."""
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
