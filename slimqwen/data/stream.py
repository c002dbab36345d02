"""Streams of training rows, in an order for which one integer, the number of rows seen, is the whole state."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from slimqwen.core.errors import UserError
from slimqwen.data.packed import PackedTokens, TokenIds, bin_path

if TYPE_CHECKING:
    import torch

ROUNDS = 4  # of the Feistel network; four make it a strong pseudo-random permutation (Luby and Rackoff, 1988)


class Place(NamedTuple):
    """The location of a row in the stored text, independent of the order of training: its number, and its source."""

    row: int
    source: str | None = None


@dataclass(frozen=True)
class Batch:
    """Rows of training data.

    tokens: int64 [rows, sequence_length + 1]. mask: True at real tokens, of the same shape; None where all are real.
    Padding is at the right end of a row, and the models are causal: no real token attends to it. So they read `tokens`
    without an attention mask, and the mask is for sums over positions: losses, targets, the experts' assignments.
    places: the location of each row, where the batch is from a stream. lengths: its tokens without padding, where it is.
    """

    tokens: "torch.Tensor"
    mask: "torch.Tensor | None" = None
    places: tuple[Place, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def targets(self) -> int | None:
        """The tokens that are predicted, counted without the device; None where that cannot be."""
        rows, columns = self.tokens.shape
        if self.mask is None:
            return rows * (columns - 1)
        return targets_of(self.lengths)[0] if self.lengths else None

    def to(self, device: "torch.device") -> "Batch":
        """Copy to a device; from pinned memory without waiting for what the device is at."""
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return replace(self, tokens=self.tokens.to(device, non_blocking=True), mask=mask)

    def pin(self) -> "Batch":
        """Copy to pinned memory, from which a GPU reads by itself."""
        return replace(
            self, tokens=self.tokens.pin_memory(), mask=None if self.mask is None else self.mask.pin_memory()
        )

    def split(self, rows: int) -> "list[Batch]":
        """Split into batches of `rows` rows; the last may be smaller."""
        tokens = self.tokens.split(rows)
        masks = [None] * len(tokens) if self.mask is None else self.mask.split(rows)
        parts = []
        for first, own_tokens, own_mask in zip(range(0, len(self.tokens), rows), tokens, masks, strict=True):
            own = slice(first, first + rows)
            parts.append(Batch(own_tokens, own_mask, self.places[own], self.lengths[own]))
        return parts


def targets_of(lengths: Iterable[int]) -> tuple[int, int]:
    """Count the predictions of the main head and of the MTP head on rows of so many tokens: 4 and 3 on a row of 5."""
    main = mtp = 0
    for length in lengths:
        main += max(length - 1, 0)
        mtp += max(length - 2, 0)
    return main, mtp


class RowStream(ABC):
    """Rows in the order of training.

    `row(i)` counts from the beginning of training, across epochs, and depends only on i: a run resumes exactly from the
    number of rows seen, and any division of a batch into micro-batches or ranks reads the same data.

    rows_per_epoch: rows before one of them repeats. padding_fraction: share of the input positions that
    have no token to predict.
    """

    sequence_length: int
    rows_per_epoch: int
    padding_fraction: float

    @abstractmethod
    def place(self, index: int) -> Place:
        """Locate row `index` of the training order in the stored text."""

    @abstractmethod
    def stored(self, place: Place) -> TokenIds:
        """Read the row at a place without its padding, int64 [at most sequence_length + 1]. Raises IndexError beyond the text."""

    @abstractmethod
    def length(self, place: Place) -> int:
        """Return how many tokens `stored` reads at a place, without reading them."""

    def row(self, index: int) -> TokenIds:
        """Read row `index` of the training order, as `stored` does."""
        return self.stored(self.place(index))

    def batch(self, first_row: int, rows: int, step: int = 1) -> Batch:
        """Read `rows` rows of the training order, every `step`-th from `first_row` on."""
        return self.rows_at(range(first_row, first_row + rows * step, step))

    def count_targets(self, first_row: int, rows: int) -> tuple[int, int]:
        """Count the predictions of the main head and of the MTP head on rows of the training order, without reading them.

        So every rank knows by itself what the loss of all ranks' rows is divided by.
        """
        if self.padding_fraction == 0.0:
            return rows * self.sequence_length, rows * (self.sequence_length - 1)
        return targets_of(self.length(self.place(row)) for row in range(first_row, first_row + rows))

    def rows_at(self, rows: Sequence[int]) -> Batch:
        """Read the given rows of the training order."""
        return self._padded([self.place(row) for row in rows])

    def _padded(self, places: Sequence[Place]) -> Batch:
        import torch

        rows, columns = [self.stored(place) for place in places], self.sequence_length + 1
        lengths = np.array([len(row) for row in rows])
        # 0 is an id in every vocabulary; the value at a masked position has no effect.
        tokens = np.zeros((len(rows), columns), dtype=np.int64)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        mask = None if lengths.min() == columns else torch.from_numpy(np.arange(columns) < lengths[:, None])
        return Batch(torch.from_numpy(tokens), mask, tuple(places), tuple(lengths.tolist()))


class StoredRows(RowStream):
    """Rows cut from one pair of files, in an order shuffled for each epoch by (seed, epoch).

    targets_per_epoch: tokens that are predicted in an epoch.
    """

    def __init__(self, tokens: PackedTokens, sequence_length: int, seed: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.seed = seed
        self.rows_per_epoch, self.targets_per_epoch = self._count()
        self.padding_fraction = 1 - self.targets_per_epoch / (self.rows_per_epoch * sequence_length)

    @abstractmethod
    def _count(self) -> tuple[int, int]:
        """Count the rows and targets of an epoch. Raises `UserError` where there is no row."""

    @abstractmethod
    def _bounds(self, row: int) -> tuple[int, int]:
        """Return where row `row` in the order of the files begins and ends among the tokens. Raises IndexError beyond the text."""

    def place(self, index: int) -> Place:
        epoch, position = divmod(index, self.rows_per_epoch)
        return Place(shuffled(position, self.rows_per_epoch, self.seed, epoch))

    def stored(self, place: Place) -> TokenIds:
        return self.tokens.slice(*self._bounds(place.row))

    def length(self, place: Place) -> int:
        start, end = self._bounds(place.row)
        return end - start

    def in_order(self, rows: Sequence[int]) -> Batch:
        """Read rows by their stored order. Raises IndexError at `rows_per_epoch` and beyond."""
        return self._padded([Place(row) for row in rows])


class TokenStream(StoredRows):
    """All documents back to back, cut into rows of `sequence_length` + 1 tokens that overlap by one.

    With S = sequence_length, row r covers stream[r S : r S + S + 1]: S inputs and, shifted by one, S targets, so every
    token but the first is a target once per epoch. The last incomplete row is left out. Ten tokens with S = 3:

        stream  0 1 2 3 4 5 6 7 8 9
        row 0   0 1 2 3
        row 1         3 4 5 6
        row 2               6 7 8 9

    A row may span several documents, and a document several rows. The eos token that ends each document is the only
    mark: neither attention nor the DeltaNet state is reset there, and the model learns from the eos that a new document
    follows.
    """

    def _count(self) -> tuple[int, int]:
        rows = (self.tokens.total_tokens - 1) // self.sequence_length
        if rows < 1:
            raise UserError(
                f"{bin_path(self.tokens.prefix)} has {self.tokens.total_tokens} tokens, fewer than the "
                f"{self.sequence_length + 1} of one row: add text or lower sequence_length."
            )
        return rows, rows * self.sequence_length

    def _bounds(self, row: int) -> tuple[int, int]:
        start = row * self.sequence_length
        return start, start + self.sequence_length + 1


def shuffled(position: int, size: int, seed: int, epoch: int) -> int:
    """Return the image of `position` under a permutation of 0..size-1 given by (seed, epoch), without a table.

    A Feistel network shuffles the numbers of 2b bits, for the least b >= 1 with 4^b >= size. In each round the halves
    (left, right) become (right, left XOR hash(round, right)), which can be undone whatever the hash: a bijection.
    Where the result is not below `size` the network is applied to it again ("cycle walking"): that follows the cycle of
    `position` to its next member below `size`, so the result is a bijection of 0..size-1. At most four rounds on average.

    Example, size 5, seed 0, epoch 0: b = 2, the network permutes 0..15 and
    0 -> 11 -> 2,  1 -> 12 -> 6 -> 0,  2 -> 10 -> 15 -> 5 -> 4,  3 -> 8 -> 1,  4 -> 14 -> 7 -> 13 -> 3.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        position = _feistel(position, half_bits, f"{seed} {epoch}")
        if position < size:
            return position


def _feistel(value: int, half_bits: int, key: str) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for round_number in range(ROUNDS):
        digest = hashlib.blake2b(f"{key} {round_number} {right}".encode(), digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
    return left << half_bits | right
