"""The stage itself: the teacher runs once over the stored text, shard after shard."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from slimqwen.artifacts import (
    alone,
    check_replaceable,
    fingerprint_value,
    joined_folder,
    make_folder,
    resumable_folder,
    write_json,
)
from slimqwen.artifacts.disk import check_space
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core import torchrun
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.errors import UserError
from slimqwen.core.progress import Progress, quiet, say
from slimqwen.data import store
from slimqwen.data.mixture import MixedStream
from slimqwen.data.stream import StoredRows
from slimqwen.losses.head import Logits
from slimqwen.losses.loss import align
from slimqwen.losses.signal import TopTokens
from slimqwen.model.device import reproducible, resolve_device, resolve_dtype
from slimqwen.parallel.job import Job, join_job
from slimqwen.recipe import Execution, TeacherRecipe, TextSettings
from slimqwen.teacher_cache.folder import (
    MANIFEST,
    Array,
    CacheManifest,
    Head,
    load_manifest,
    shard_entry,
    shard_name,
    text_fingerprint,
    write_shard,
)
from slimqwen.teacher_cache.predict import InMemory, LayerByLayer, Pieces, Predictor, fits
from slimqwen.teacher_cache.records import bytes_per_token, pack

IN_MEMORY, LAYER_BY_LAYER = "in memory", "layer by layer"  # ways to run the teacher
CHUNK_TOKENS = 1024  # whose logits exist at one time


@dataclass(frozen=True)
class Cache:
    """One that is to be written: of the whole text, or of one source of a mixture. sequences: in the order of the text."""

    out: Path
    stream: StoredRows
    sequences: Sequence[int]
    manifest: CacheManifest

    @property
    def is_done(self) -> bool:
        if not (self.out / MANIFEST).is_file():
            return False
        return load_manifest(self.out).model_copy(update={"shards": []}) == self.manifest

    @property
    def total_bytes(self) -> int:
        """At most: padding has no record."""
        return len(self.sequences) * self.stream.sequence_length * self.manifest.bytes_per_token

    @property
    def left_bytes(self) -> int:
        """Not yet written, by this call or an interrupted one."""
        finished = self.out.parent.glob(f".{self.out.name}.partial/shard-*.safetensors")
        return 0 if self.is_done else max(self.total_bytes - sum(file.stat().st_size for file in finished), 0)


def write_teacher_cache(
    teacher: Path,
    out: Path,
    *,
    tokens: Path,
    recipe: TeacherRecipe,
    text: TextSettings,
    with_mtp: bool = False,
    sequences: int | None = None,
    execution: Execution = Execution(),  # noqa: B008 - immutable
    title: str = "teacher-cache",
) -> Path:
    """Write `teacher`'s distributions for the training text of the folder `tokens` to the folder `out`; return `out`.

    An interrupted call leaves its finished shards, and the same call continues with the first that is not there. All
    processes that torchrun started may call it together: each writes shards of its own.

    Args:
        with_mtp: the teacher's MTP head's, too (for `mtp_target: mtp`).
        sequences: only so many, the first in the training order of `text.seed`. Default: the whole text, which serves any seed.
    """
    checkpoint = Checkpoint(teacher)
    vocab_size = checkpoint.config["vocab_size"]
    store.check_vocabulary(store.load_manifest(tokens), tokens, teacher, vocab_size)
    check_teacher(recipe, checkpoint, with_mtp)
    torch_device = resolve_device(execution.device)
    torch_dtype = resolve_dtype(text.dtype, torch_device)

    heads: list[Head] = ["main", "mtp"] if with_mtp else ["main"]
    sequence_bytes = text.sequence_length * len(heads) * bytes_per_token(recipe.top_k, vocab_size, recipe.exact)
    fingerprint = checkpoint.fingerprint()
    caches = []
    for source, (stream, chosen) in _read_sources(tokens, text, sequences).items():
        manifest = CacheManifest(
            teacher=fingerprint,
            dtype=str(torch_dtype).removeprefix("torch."),
            text=text_fingerprint(stream.tokens.prefix),
            sequence_length=text.sequence_length,
            documents=text.documents,
            vocab_size=vocab_size,
            top_k=recipe.top_k,
            exact=recipe.exact,
            heads=heads,
            subset=None if isinstance(chosen, range) else fingerprint_value(chosen),
            sequences=len(chosen),
            sequences_per_shard=max(execution.cache_file_bytes // sequence_bytes, 1),
        )
        caches.append(Cache(out / (source or "."), stream, chosen, manifest))
    with join_job(torch_device) as job, quiet(not job.is_first):
        for cache in caches:
            check_replaceable(cache.out, teacher, tokens, kind="teacher_cache")
        with alone(out):
            pending = json.loads(job.lead(lambda: _prepare(caches, out, title)))
            _write_all([caches[number] for number in pending], out, checkpoint, execution, torch_dtype, job, title)
    return out


def _prepare(caches: list[Cache], out: Path, title: str) -> str:
    """Print what will be written, make room for it, and return the numbers of the caches that are not there yet, as JSON."""
    _announce(caches, out, title)
    for cache in caches:
        with make_folder(cache.out):  # in order, whatever killed an earlier call
            pass
    return json.dumps([number for number, cache in enumerate(caches) if not cache.is_done])


def _write_all(
    caches: list[Cache],
    out: Path,
    checkpoint: Checkpoint,
    execution: Execution,
    torch_dtype: torch.dtype,
    job: Job,
    title: str,
) -> None:
    """Write them, by all ranks of the job."""
    if caches:
        predictor = _load_predictor(checkpoint, execution, caches[0].manifest, torch_dtype, job)
        with torch.inference_mode(), reproducible(resolve_device(execution.device)):
            for cache in caches:
                _write(cache, predictor, job, title if cache.out == out else f"{title} {cache.out.name}")


def check_teacher(recipe: TeacherRecipe, teacher: Checkpoint, with_mtp: bool) -> None:
    """Raise UserError for a distribution that the teacher does not have."""
    if recipe.top_k > teacher.config["vocab_size"]:
        raise UserError(
            f"distil.teacher.top_k {recipe.top_k:,} is more than the {teacher.config['vocab_size']:,} tokens in the vocabulary of "
            f"{teacher.folder}: the vocabulary's size keeps everything."
        )
    if with_mtp and not teacher.has_mtp:
        raise UserError(f"{teacher.folder} has no MTP module whose predictions could be stored: leave them out.")


def _read_sources(
    tokens: Path, text: TextSettings, sequences: int | None
) -> dict[str | None, tuple[StoredRows, Sequence[int]]]:
    """Return for each source of a mixture, or the one text (None): its rows, and which of them to store (a range: all)."""
    stream = store.training_stream(tokens, text.sequence_length, text.seed, text.documents)
    parts: dict[str | None, tuple[StoredRows, int | None]]
    if isinstance(stream, MixedStream):
        counts = dict.fromkeys(stream.streams) if sequences is None else stream.rows_of_sources(sequences)
        parts = {name: (part, counts[name]) for name, part in stream.streams.items()}
    else:
        assert isinstance(stream, StoredRows)
        parts = {None: (stream, sequences)}
    found: dict[str | None, tuple[StoredRows, Sequence[int]]] = {}
    for source, (part, count) in parts.items():
        if count is None or count >= part.rows_per_epoch:
            found[source] = part, range(part.rows_per_epoch)
        else:
            found[source] = part, sorted(part.place(index).row for index in range(count))
    return found


def _announce(caches: list[Cache], out: Path, title: str) -> None:
    """Print what will be written. Raises StageFailed where the disk has no room for it."""
    total, left = sum(cache.total_bytes for cache in caches), sum(cache.left_bytes for cache in caches)
    place = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    of = caches[0].manifest
    say(
        f"{title}: {sum(len(cache.sequences) for cache in caches):,} sequences of {of.sequence_length:,} tokens, the "
        f"{of.top_k:,} most likely of {of.vocab_size:,} in {of.bytes_per_token} bytes a token ({' and '.join(of.heads)} head): "
        f"{bytes_in_words(total)}, of which {bytes_in_words(left)} are to be written; {bytes_in_words(free)} are free"
    )
    check_space(out, left, free, "lower distil.teacher.top_k or the number of sequences")


def _load_predictor(
    checkpoint: Checkpoint, execution: Execution, manifest: CacheManifest, dtype: torch.dtype, job: Job
) -> Predictor:
    """Return the teacher, in memory where it fits (of every rank) and `execution` leaves it open."""
    with_mtp = "mtp" in manifest.heads
    processes = torchrun.local_world_size() if job.share[1] > 1 else 1

    def choose_way() -> str:
        if execution.streaming is not None:
            return LAYER_BY_LAYER if execution.streaming else IN_MEMORY
        device = resolve_device(execution.device)
        return IN_MEMORY if fits(checkpoint, dtype, device, execution.memory_budget, processes) else LAYER_BY_LAYER

    if job.lead(choose_way) == IN_MEMORY:
        return InMemory(checkpoint, execution, with_mtp=with_mtp, dtype=dtype)
    return LayerByLayer(
        checkpoint,
        execution,
        with_mtp=with_mtp,
        sequences=min(manifest.sequences_per_shard, max(manifest.sequences, 1)),
        sequence_length=manifest.sequence_length,
        dtype=dtype,
        processes=processes,
    )


def _write(cache: Cache, predictor: Predictor, job: Job, title: str) -> None:
    rank, size_of_job = job.share
    manifest = cache.manifest
    logits = Logits(predictor.head, CHUNK_TOKENS)
    size = manifest.sequences_per_shard
    shards = [cache.sequences[first : first + size] for first in range(0, len(cache.sequences), size)]
    key = fingerprint_value(manifest.model_dump(mode="json"))
    with resumable_folder(cache.out, key) if rank == 0 else joined_folder(cache.out) as folder:
        files = [folder / shard_name(number) for number in range(len(shards))]
        positions = manifest.sequence_length * predictor.passes
        missing = json.loads(job.lead(lambda: json.dumps([n for n, file in enumerate(files) if not file.exists()])))
        own = missing[rank::size_of_job]
        done = len(cache.sequences) - sum(len(shards[number]) for number in missing)
        unit = "tokens" if predictor.passes == 1 else "token-layers"
        total = done + sum(len(shards[number]) for number in own)
        with Progress(title, total=total * positions, unit=unit, start=done * positions) as progress:
            while own:
                taken = own[: predictor.shards_at_once(len(own))]
                own = own[len(taken) :]
                rows = [cache.stream.in_order(shards[number]) for number in taken]
                found = predictor.hidden_states(rows, progress.advance)
                for number, pieces in zip(taken, found, strict=True):
                    write_shard(files[number], shards[number], *_compute_records(pieces, logits, manifest))
        job.wait()
        if rank != 0:
            return
        finished = manifest.model_copy(update={"shards": [shard_entry(file) for file in files]})
        write_json(folder / MANIFEST, finished.model_dump(mode="json"))


def _compute_records(
    shard: Pieces, logits: Logits, manifest: CacheManifest
) -> tuple[list[int], dict[Head, dict[str, Array]]]:
    """Return predicted tokens of each sequence of a shard, and each head's arrays of all of them."""
    lengths: list[int] = []
    pieces: dict[Head, list[dict[str, Array]]] = {head: [] for head in manifest.heads}
    for batch, hidden in shard:
        aligned = align(batch.tokens, hidden.main, hidden.mtp, batch.mask)
        lengths += aligned.main_mask.view(len(batch.tokens), -1).sum(1).tolist()
        counted = aligned.main_mask.to(aligned.hidden.device)
        for head, states in (("main", aligned.hidden), ("mtp", aligned.mtp_hidden)):
            if head in manifest.heads and states is not None:
                top = select_most_likely(logits, states[counted], manifest.top_k)
                pieces[head].append(pack(top, manifest.vocab_size, manifest.exact))
    return lengths, {
        head: {name: np.concatenate([piece[name] for piece in of_head]) for name in of_head[0]}
        for head, of_head in pieces.items()
    }


def select_most_likely(logits: Logits, hidden: torch.Tensor, k: int) -> TopTokens:
    """Return the k most likely tokens of each prediction, hidden [N, hidden]: computed as the live teacher's distributions are."""
    found = []
    for states in hidden.split(logits.chunk.shape[0]):
        logits.project(states)
        found += [TopTokens.of(logits.softmax(block), k) for block in logits.blocks(len(states))]
    return TopTokens(*(torch.cat(parts) for parts in zip(*found, strict=True)))
