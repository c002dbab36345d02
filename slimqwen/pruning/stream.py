"""Making a checkpoint piece by piece: reading, computing and writing at once, in the memory of a few pieces."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from slimqwen.checkpoint.writer import CheckpointWriter
from slimqwen.core.progress import Progress
from slimqwen.families.axes import Term
from slimqwen.families.family import Block
from slimqwen.planning.experts import ExpertGroup
from slimqwen.pruning.read_ahead import ReadAhead

PIECE_BYTES = 16 << 20
WORKERS = 4  # threads: one waits for the disk while another computes, also where there are two cores
READ_AHEAD = 8  # batches


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor of the result, or what one expert contributes to a stacked one.

    name, first_row: where its rows go. block: the block of the source. pattern, dims: as in the family's table.
    group: the source experts that it is the mean of; None for what is no routed expert's.
    """

    name: str
    first_row: int
    rows: int
    row_bytes: int
    block: Block
    pattern: str
    dims: tuple[Term, ...]
    group: ExpertGroup | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of a matrix."""

    matrix: Matrix
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.matrix.row_bytes


Batch = list[Piece]


def batches_of(matrices: Iterable[Matrix]) -> list[Batch]:
    """Divide matrices into pieces of at most PIECE_BYTES (or one row), several small ones together, in order.

    A thread takes a batch at once: one task for each of an 80B checkpoint's 75,944 tensors would itself take 100 MB.
    """
    batches: list[Batch] = [[]]
    filled = 0
    for matrix in matrices:
        step = max(1, PIECE_BYTES // matrix.row_bytes)
        for start in range(0, matrix.rows, step):
            piece = Piece(matrix, start, min(start + step, matrix.rows))
            if filled + piece.nbytes > PIECE_BYTES:
                batches.append([])
                filled = 0
            batches[-1].append(piece)
            filled += piece.nbytes
    return batches


def stream(
    writer: CheckpointWriter,
    batches: list[Batch],
    *,
    sources: Callable[[Matrix], list[torch.Tensor]],
    make: Callable[[Piece], torch.Tensor],
    title: str,
) -> None:
    """Write every piece, by WORKERS threads with one piece each in memory.

    sources: the memory-mapped tensors that a matrix is made of; they are read ahead. make: its rows.
    """

    def work(number: int) -> int:
        for batch in batches[:READ_AHEAD] if number == 0 else batches[number + READ_AHEAD - 1 : number + READ_AHEAD]:
            _read_ahead(batch, sources, ahead)
        for piece in batches[number]:
            writer.add(piece.matrix.name, make(piece), piece.matrix.first_row + piece.start)
        return sum(piece.nbytes for piece in batches[number])

    ahead = ReadAhead()
    start = writer.found_bytes
    with (
        one_thread_each(),
        Progress(title, total=start + writer.own_bytes, unit="bytes", start=start) as progress,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        for nbytes in pool.map(work, range(len(batches))):
            progress.advance(nbytes)


def peak_bytes(rotated: bool = False) -> int:
    """Return the memory of the pieces in the making.

    Of each its rows as read, with their kept columns, and joined; rotated, of 16-bit numbers, in float32 before and after.
    """
    return (3 + 4 * rotated) * WORKERS * PIECE_BYTES


def _read_ahead(batch: Batch, sources: Callable[[Matrix], list[torch.Tensor]], ahead: ReadAhead) -> None:
    for piece in batch:
        for tensor in sources(piece.matrix):
            kept = len(tensor) / piece.matrix.rows  # source rows per row: about where the piece comes from
            ahead.start(tensor[int(piece.start * kept) : int(piece.stop * kept)])


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch compute in the calling threads alone while open: they share the processor, and it would start as many below each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
