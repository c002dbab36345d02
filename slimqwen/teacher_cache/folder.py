"""A folder of a teacher's distributions, as the stage writes it and distillation reads it.

manifest.json                what it holds and what it was made from: `CacheManifest`
shard-000000.safetensors     the records of the first `sequences_per_shard` sequences of the stored text, and so on

A sequence is a row of the stored text, whatever the order of training: one cache serves every seed, epoch, batch size,
number of ranks and mixture. Of a mixture each source has a cache of its own, in a folder with its name.

In a shard of R sequences with T predicted tokens are: `sequences` int64 [R], their numbers, ascending; `ends` int64 [R], where
the records of each end; `sha256` uint8 [R, 32], of the records of each; and the arrays of `records`, [T, per token], below
`main.` and, with an MTP head, `mtp.`. Token t of sequence r is its t-th prediction, the token after its first t + 1: both heads
lie at the token they predict (`distillation.loss.align`). Padding has no record.

Everything is checked: the sizes of all shards when a cache is opened, the first three arrays of a shard against the
manifest when it is opened, the records of a sequence against their sha256 each time they are read.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slimqwen.artifacts import atomic_file, fingerprint, fingerprint_value
from slimqwen.artifacts.json_file import load_model
from slimqwen.core.errors import UserError
from slimqwen.data.packed import bin_path, idx_path
from slimqwen.losses.signal import TopTokens
from slimqwen.recipe import DocumentBoundaries, PositiveInt
from slimqwen.teacher_cache.records import bytes_per_token, unpack

MANIFEST = "manifest.json"
OPEN_SHARDS = 256  # kept mapped at one time: a system allows some 65,000 mappings to a process
INDEX = ("sequences", "ends", "sha256")

Head = Literal["main", "mtp"]
Array = npt.NDArray[np.generic]


class ShardEntry(BaseModel):
    """One shard: its size, and the sha256 of its three index arrays, one after another."""

    model_config = ConfigDict(extra="forbid")

    bytes: PositiveInt
    sha256: str


class CacheManifest(BaseModel):
    """What a cache holds and what it was made from."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["slimqwen.teacher_cache/1"] = "slimqwen.teacher_cache/1"
    teacher: str  # fingerprint of the checkpoint
    dtype: str  # that it computed in
    text: str  # `text_fingerprint`
    sequence_length: PositiveInt
    documents: DocumentBoundaries
    vocab_size: PositiveInt
    top_k: PositiveInt
    exact: bool
    heads: Annotated[list[Head], Field(min_length=1, max_length=2)]
    subset: str | None  # None: every sequence of the text is here; else a fingerprint of the numbers of those that are
    sequences: NonNegativeInt  # that are here
    sequences_per_shard: PositiveInt
    shards: list[ShardEntry] = []

    @property
    def bytes_per_token(self) -> int:
        return len(self.heads) * bytes_per_token(self.top_k, self.vocab_size, self.exact)

    @property
    def number_of_shards(self) -> int:
        return -(-self.sequences // self.sequences_per_shard)

    def identity(self) -> str:
        """Return a fingerprint that changes with whatever changes a record."""
        return fingerprint_value(self.model_dump(mode="json"))


def text_fingerprint(prefix: Path) -> str:
    """Return the fingerprint of token ids and document boundaries below a prefix, wherever they lie."""
    return fingerprint_value([fingerprint(bin_path(prefix)), fingerprint(idx_path(prefix))])


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def write_shard(
    path: Path, sequences: Sequence[int], lengths: list[int], heads: Mapping[Head, Mapping[str, Array]]
) -> None:
    """Write a shard atomically. lengths: predicted tokens of each sequence; heads: the arrays of `pack`, of all these tokens."""
    ends = np.cumsum(lengths, dtype=np.int64)
    arrays = {f"{head}.{name}": array for head, record in heads.items() for name, array in record.items()}
    digests = [_digest(array[end - n : end] for array in arrays.values()) for n, end in zip(lengths, ends, strict=True)]
    index: dict[str, Array] = {
        "sequences": np.array(sequences, dtype=np.int64),
        "ends": ends,
        "sha256": np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(sequences), 32),
    }
    with atomic_file(path) as partial:
        save_file({**index, **arrays}, partial)


def shard_entry(path: Path) -> ShardEntry:
    """Return the manifest's entry of a finished shard."""
    file = _open(path)
    return ShardEntry(bytes=path.stat().st_size, sha256=_digest(file.get_tensor(name) for name in INDEX).hex())


class TeacherCache:
    """A cache opened for reading: memory-mapped, nothing in memory but the numbers of the sequences of a partial one.

    Raises UserError for a folder that is no cache, and for a shard that is missing, cut short or changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = load_manifest(folder)
        if len(self.manifest.shards) != self.manifest.number_of_shards:
            raise UserError(
                f"{folder / MANIFEST} lists {len(self.manifest.shards)} shards for {self.manifest.sequences:,} sequences, "
                f"which fill {self.manifest.number_of_shards}: run `slimqwen teacher-cache` again."
            )
        for number, entry in enumerate(self.manifest.shards):
            path = folder / shard_name(number)
            size = path.stat().st_size if path.is_file() else 0
            if size != entry.bytes:
                raise UserError(
                    f"{path} has {size:,} bytes where the manifest says {entry.bytes:,}: copy it again, or run "
                    "`slimqwen teacher-cache` again."
                )
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        shards = range(0 if self.manifest.subset is None else len(self.manifest.shards))
        self._sequences = np.concatenate([np.zeros(0, np.int64), *(self._shard(n)[1]["sequences"] for n in shards)])

    def __contains__(self, sequence: int) -> bool:
        return self._position(sequence) is not None

    def read(self, sequence: int) -> dict[Head, TopTokens]:
        """Read each head's distributions for a sequence of the stored text: N = its predicted tokens."""
        position = self._position(sequence)
        if position is None:
            raise UserError(
                f"{self.folder} does not contain sequence {sequence:,}: run `slimqwen teacher-cache` again."
            )
        number, row = divmod(position, self.manifest.sequences_per_shard)
        file, index = self._shard(number)
        tokens = slice(int(index["ends"][row - 1]) if row else 0, int(index["ends"][row]))
        heads = {
            head: {
                name: file.get_slice(f"{head}.{name}")[tokens]
                for name in ("ids_low", "ids_high", "log_probs", "log_tail")
            }
            for head in self.manifest.heads
        }
        if index["sequences"][row] != sequence or _digest(
            a for arrays in heads.values() for a in arrays.values()
        ) != bytes(index["sha256"][row]):
            raise self._corrupt(number)
        return {head: unpack(arrays, self.manifest.vocab_size) for head, arrays in heads.items()}

    def _position(self, sequence: int) -> int | None:
        """Return the position among the sequences of this cache, or None."""
        if self.manifest.subset is None:
            return sequence if 0 <= sequence < self.manifest.sequences else None
        position = int(np.searchsorted(self._sequences, sequence))
        found = position < len(self._sequences) and self._sequences[position] == sequence
        return position if found else None

    def _open_shard(self, number: int) -> tuple[Any, dict[str, Array]]:
        """Map a file; return it and its index arrays."""
        file = _open(self.folder / shard_name(number))
        try:
            index = {name: file.get_tensor(name) for name in INDEX}
        except SafetensorError as error:
            raise self._corrupt(number) from error
        if _digest(index.values()).hex() != self.manifest.shards[number].sha256:
            raise self._corrupt(number)
        return file, index

    def _corrupt(self, number: int) -> UserError:
        return UserError(
            f"{self.folder / shard_name(number)} is corrupt: it does not have the checksum it was written with. Copy it "
            "again, or run `slimqwen teacher-cache` again."
        )


def load_manifest(folder: Path) -> CacheManifest:
    """Read the manifest of a cache; raise `UserError` where it is missing or not one."""
    advice = "`slimqwen teacher-cache` writes it when it is finished."
    return load_model(folder / MANIFEST, CacheManifest, what="the manifest of a teacher's cache", advice=advice)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt ({' '.join(str(error).split())}): copy it again.") from error


def _digest(arrays: Iterable[Array]) -> bytes:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
