r"""Token ids on disk in Megatron's indexed-dataset format, which many trainers read and write.

Two files share a prefix. `PREFIX.bin` holds only the token ids, document after document. `PREFIX.idx`, all
little-endian, is the index of the documents (Megatron-LM, megatron/core/datasets/indexed_dataset.py):

    bytes  content
    9      magic, b"MMIDIDX\0\0"
    8      version, uint64 = 1
    1      code of the ids' dtype, see DTYPES
    8      S, number of sequences, uint64
    8      D, number of entries of the last array, uint64: documents + 1
    4 S    tokens in each sequence, int32
    8 S    byte at which each sequence begins in the .bin file, int64
    8 D    first sequence of each document, and S at the end, int64

We write one sequence per document. Example: the documents [7, 8, 9] and [5] as uint16 are a .bin file of 8 bytes,
lengths [3, 1], pointers [0, 6], document indices [0, 1, 2].
"""

import struct
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from slimqwen.core.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats: no token ids
UINT16, INT32 = 8, 4
CHECKED_AT_ONCE = 1 << 20  # sequences whose pointers, or tokens whose ids, are compared at one time

TokenIds = npt.NDArray[np.int64]


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


class PackedWriter:
    """A writer that appends documents to `PREFIX.bin` and writes `PREFIX.idx` at the end.

    Ids are uint16 where `vocab_size` <= 65,536 (largest id 65,535), else int32. Memory: 4 bytes per document
    while writing, 20 at the end. As a context manager it finishes on exit, except after an exception: then
    no index is written, and nothing looks finished.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.total_tokens = 0
        self._code = UINT16 if vocab_size <= 1 << 16 else INT32
        self._lengths = array("i")
        self._bin = bin_path(prefix).open("wb")

    def add(self, token_ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Append one document's ids, [tokens]."""
        ids = np.asarray(token_ids, dtype=np.int64)
        assert ids.ndim == 1, f"the ids of a document must be one-dimensional, not of shape {ids.shape}"
        assert not ids.size or 0 <= ids.min() <= ids.max() < self.vocab_size, "a token id outside the vocabulary"
        if ids.size >= 1 << 31:
            raise UserError(
                f"a document of {ids.size:,} tokens does not fit {bin_path(self.prefix)}: split it into several."
            )
        self._bin.write(ids.astype(DTYPES[self._code]).tobytes())
        self._lengths.append(ids.size)
        self.total_tokens += ids.size

    def finish(self) -> None:
        """Close the .bin file and write the index."""
        self._bin.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, np.int32)
        pointers = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=pointers[1:], dtype=np.int64)
        pointers *= np.dtype(DTYPES[self._code]).itemsize
        with idx_path(self.prefix).open("wb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(lengths) + 1))
            stream.write(lengths.astype("<i4", copy=False).data)
            stream.write(pointers[:-1].astype("<i8", copy=False).data)
            stream.write(np.arange(len(lengths) + 1, dtype="<i8").data)

    def __enter__(self) -> "PackedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._bin.close()


class PackedTokens:
    """The documents of one prefix as a single stream of token ids, memory-mapped.

    `total_tokens` and `documents` count them. Both files are checked against each other on opening: UserError names
    one that is missing, truncated, of another format or larger than its index states.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        code, sequences, indices = _read_header(idx_path(prefix))
        self.dtype = np.dtype(DTYPES[code])
        self.documents = indices - 1
        self._index = _Index(idx_path(prefix), sequences, indices)
        self.total_tokens = _check_index(prefix, self.dtype.itemsize, self._index)
        self._ids = np.memmap(bin_path(prefix), dtype=self.dtype, mode="r")

    def slice(self, start: int, stop: int) -> TokenIds:
        """Copy ids `start` to `stop` (exclusive) of the concatenated documents: int64 [stop - start]."""
        if not 0 <= start <= stop <= self.total_tokens:
            raise IndexError(f"tokens {start}..{stop} of {self.prefix}, which has {self.total_tokens}")
        return np.asarray(self._ids[start:stop]).astype(np.int64)

    def boundaries(self, first: int, stop: int) -> TokenIds:
        """Return the first token of documents `first` to `stop` (exclusive), and the last one's end: int64 [stop - first + 1]."""
        sequences = np.asarray(self._index.documents[first : stop + 1])
        starts = np.full(len(sequences), self.total_tokens, dtype=np.int64)
        inside = sequences < len(self._index.pointers)  # one after the last sequence ends the last document
        starts[inside] = self._index.pointers[sequences[inside]] // self.dtype.itemsize
        return starts

    def check_ids(self, vocab_size: int, on_read: Callable[[int], None]) -> None:
        """Raise UserError for an id outside 0..vocab_size - 1. `on_read` is called with the bytes read."""
        for first in range(0, self.total_tokens, CHECKED_AT_ONCE):
            ids = self._ids[first : first + CHECKED_AT_ONCE]
            if ids.min() < 0 or ids.max() >= vocab_size:
                place = first + int(np.argmax((ids < 0) | (ids >= vocab_size)))
                raise UserError(
                    f"{bin_path(self.prefix)} holds the id {self._ids[place]} (token {place:,}), and the tokenizer has "
                    f"{vocab_size:,} tokens: the file was made with another tokenizer."
                )
            on_read(ids.nbytes)


class _Index:
    """The arrays of an .idx file, memory-mapped. The int64 ones begin at odd offsets, which memmap allows."""

    def __init__(self, path: Path, sequences: int, indices: int) -> None:
        self.path = path
        offsets = [HEADER.size, HEADER.size + 4 * sequences, HEADER.size + 12 * sequences]
        if sequences == 0 or indices < 2:
            raise UserError(f"{path} lists no document.")
        self.lengths = np.memmap(path, "<i4", "r", offset=offsets[0], shape=(sequences,))  # tokens in each sequence
        self.pointers = np.memmap(path, "<i8", "r", offset=offsets[1], shape=(sequences,))  # byte where each begins
        self.documents = np.memmap(path, "<i8", "r", offset=offsets[2], shape=(indices,))  # first sequence of each


def _read_header(path: Path) -> tuple[int, int, int]:
    """Read (dtype code, sequences, document indices), and check that they match the file's length."""
    try:
        with path.open("rb") as stream:
            header = stream.read(HEADER.size)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): tokenize the text again.") from error
    if not header.startswith(MAGIC):
        raise UserError(f"{path} is not an index of packed tokens: it does not begin with {MAGIC!r}.")
    if len(header) < HEADER.size:
        raise UserError(f"{path} is truncated: {len(header)} bytes, of which the header alone takes {HEADER.size}.")
    _, version, code, sequences, indices = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{path} has version {version} of the format; only version {VERSION} can be read.")
    if code not in DTYPES:
        raise UserError(
            f"{path} declares dtype code {code} for its token ids; integers have {', '.join(map(str, DTYPES))}."
        )
    expected_bytes, found_bytes = HEADER.size + 12 * sequences + 8 * indices, path.stat().st_size
    # Megatron's multimodal indices end with one more byte per sequence, its mode, which text does not need.
    if found_bytes not in (expected_bytes, expected_bytes + sequences):
        raise UserError(
            f"{path} is truncated or corrupt: its header implies {expected_bytes} bytes, it has {found_bytes}."
        )
    return code, sequences, indices


def _check_index(prefix: Path, itemsize: int, index: _Index) -> int:
    """Check that the sequences fill the .bin file one after the other without a gap; returns the number of tokens."""
    path, lengths, sequences = index.path, index.lengths, len(index.lengths)
    end_bytes = 0
    for first in range(0, sequences, CHECKED_AT_ONCE):
        block = slice(first, first + CHECKED_AT_ONCE)
        ends = end_bytes + np.cumsum(lengths[block], dtype=np.int64) * itemsize
        begins = np.concatenate(([end_bytes], ends[:-1]))
        if lengths[block].min() < 0 or not np.array_equal(index.pointers[block], begins):
            raise UserError(f"{path} is corrupt: its sequences do not follow one another without gaps.")
        end_bytes = int(ends[-1])
    # The array holds the documents' boundaries, in order: 0, ..., sequences.
    firsts = index.documents
    if firsts[0] != 0 or firsts[-1] != sequences or np.any(np.diff(firsts) < 0):
        raise UserError(f"{path} is corrupt: its document indices do not run from 0 to its {sequences} sequences.")

    data = bin_path(prefix)
    if not data.is_file():
        raise UserError(f"{data} is missing, though its index {path} is there: tokenize the text again.")
    if data.stat().st_size != end_bytes:
        raise UserError(
            f"{data} has {data.stat().st_size} bytes where its index implies {end_bytes}: it is truncated or corrupt."
        )
    if end_bytes == 0:
        raise UserError(f"{data} holds no token.")
    return end_bytes // itemsize
