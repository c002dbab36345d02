"""A cached teacher: its distributions are read from disk, and none of its weights are loaded."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from slimqwen.artifacts import fingerprint_value
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.data.mixture import MixedStream
from slimqwen.data.stream import Batch, RowStream, StoredRows
from slimqwen.losses.signal import StoredSignal, TopTokens
from slimqwen.recipe import DistilRecipe, DocumentBoundaries, OnBadStep
from slimqwen.teacher_cache.folder import CacheManifest, Head, TeacherCache, text_fingerprint
from slimqwen.training.teacher import ignore

WRITE_IT = "write one for this run with `slimqwen teacher-cache`"


class CachedTeacher:
    """Teacher whose distributions for the rows of a batch come from caches.

    caches: one per source of a mixture, by the source's name, or one for the only text (key None). identity: a hash of their
    manifests, so that it changes with the caches.
    """

    def __init__(self, caches: Mapping[str | None, TeacherCache], *, teaches_mtp: bool) -> None:
        self._caches = caches
        self._heads: list[Head] = ["main", "mtp"] if teaches_mtp else ["main"]
        self.identity = fingerprint_value([cache.manifest.identity() for cache in caches.values()])

    def prepare(self, batch: Batch, pause: Callable[[], None] = ignore) -> None:
        pass

    def signal(self, batch: Batch) -> StoredSignal:
        """Return the stored distributions, aligned with the student's predictions; the loss masks those at padding."""
        columns, device = batch.tokens.shape[1] - 1, batch.tokens.device
        stored = [self._caches[place.source].read(place.row) for place in batch.places]
        signals = {head: _pad_and_flatten([heads[head] for heads in stored], columns, device) for head in self._heads}
        return StoredSignal(signals["main"], signals.get("mtp"))


def _pad_and_flatten(rows: list[TopTokens], columns: int, device: torch.device) -> TopTokens:
    """Pad rows of at most `columns` predictions with zeros to `columns` each, and flatten them: N = rows * columns."""
    tensors = []
    for of_rows in zip(*rows, strict=True):
        first = of_rows[0]
        padded = first.new_zeros(len(rows), columns, *first.shape[1:])
        for row, tensor in zip(padded, of_rows, strict=True):
            row[: len(tensor)] = tensor
        flat = padded.flatten(0, 1)
        # From pinned memory a GPU copies while it computes; from other memory the copy would wait for it.
        tensors.append((flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True))
    return TopTokens(*tensors)


def open_teacher_cache(
    folder: Path | None,
    stream: RowStream,
    *,
    rows: int,
    recipe: DistilRecipe,
    documents: DocumentBoundaries,
    on_bad_step: OnBadStep = "stop",
    student: Checkpoint,
    teacher: Path | None,
) -> CachedTeacher:
    """Open the cache for a training on the first `rows` rows of `stream`.

    teacher: the checkpoint that the cache must have been written from; None accepts any. Raises UserError for a cache of
    another text, of rows cut otherwise, or of another teacher, and for one without the distributions that the loss needs.
    """
    if folder is None:
        raise UserError("distil.teacher is 'cache': give the folder of the teacher cache with --teacher-cache DIR.")
    parts: dict[str | None, tuple[StoredRows, int]]
    if isinstance(stream, MixedStream):
        counts = stream.rows_of_sources(rows)
        parts = {name: (part, counts[name]) for name, part in stream.streams.items()}
    else:
        assert isinstance(stream, StoredRows)
        parts = {None: (stream, rows)}
    teaches_mtp = recipe.is_taught_by_mtp and student.has_mtp
    of_teacher = None if teacher is None else Checkpoint(teacher).fingerprint()
    caches = {}
    for source, (part, count) in parts.items():
        cache = TeacherCache(folder / (source or "."))
        manifest = cache.manifest
        _check_origin(cache, part, documents, teacher, of_teacher)
        if manifest.vocab_size != student.config["vocab_size"]:
            raise UserError(
                f"{cache.folder} was written by a teacher with {manifest.vocab_size:,} tokens in its vocabulary, and student "
                f"{student.folder} has {student.config['vocab_size']:,}: distillation needs the same vocabulary."
            )
        if teaches_mtp and "mtp" not in manifest.heads:
            raise UserError(
                f"distil.mtp_target is 'mtp', and {cache.folder} holds no MTP head: write it with `slimqwen teacher-cache --mtp`, "
                "or use mtp_target: main."
            )
        check_temperature(recipe, manifest.top_k, manifest.vocab_size)
        if manifest.subset is not None and on_bad_step == "roll_back":
            raise UserError(
                f"execution.bad_steps 'roll_back' goes on to later rows of the text, and {cache.folder} holds {manifest.sequences:,} "
                "sequences of it only: write a cache of the whole text, or choose stop or skip."
            )
        if manifest.subset is not None and not all(
            part.place(i).row in cache for i in range(min(count, part.rows_per_epoch))
        ):
            raise UserError(
                f"{cache.folder} holds {manifest.sequences:,} sequences of the text, and not all of those that this run trains "
                "on: write it with the run's seed and number of sequences, or of the whole text."
            )
        caches[source] = cache
    return CachedTeacher(caches, teaches_mtp=teaches_mtp)


def check_temperature(recipe: DistilRecipe, top_k: int, vocab_size: int) -> None:
    """Raise UserError for a temperature other than 1 where the cache does not hold whole distributions."""
    if recipe.divergence.temperature != 1.0 and top_k < vocab_size:
        raise UserError(
            f"distil.divergence.temperature {recipe.divergence.temperature:g} needs the teacher's whole distribution, and its cache keeps the "
            f"{top_k:,} most likely tokens and the sum of the others: use temperature 1, or teacher: live."
        )


def _check_origin(
    cache: TeacherCache,
    part: StoredRows,
    documents: DocumentBoundaries,
    teacher: Path | None,
    of_teacher: str | None,
) -> None:
    """Raise UserError unless the cache holds the rows of `part`, written by the expected teacher."""
    manifest: CacheManifest = cache.manifest
    if manifest.sequence_length != part.sequence_length:
        raise UserError(
            f"{cache.folder} holds sequences of {manifest.sequence_length:,} tokens, and this run trains on sequences of "
            f"{part.sequence_length:,}: {WRITE_IT}."
        )
    if manifest.documents != documents:
        raise UserError(
            f"{cache.folder} holds '{manifest.documents}' documents, and this run trains on '{documents}': {WRITE_IT}."
        )
    if manifest.text != text_fingerprint(part.tokens.prefix):
        raise UserError(
            f"{cache.folder} was written for other token ids than those of {part.tokens.prefix}: {WRITE_IT}."
        )
    if of_teacher is not None and manifest.teacher != of_teacher:
        raise UserError(f"{cache.folder} was written by another teacher than {teacher}: {WRITE_IT}.")
