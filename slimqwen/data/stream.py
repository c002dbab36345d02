"""Packed tokens as rows of training data, in an order that one integer, the number of rows seen, describes fully."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from slimqwen.data.packed import PackedTokens, TokenIds
from slimqwen.errors import UserError

if TYPE_CHECKING:
    import torch

ROUNDS = 4  # of the Feistel network; four make it a strong pseudo-random permutation (Luby and Rackoff, 1988)


class TokenStream:
    """All documents back to back, cut into rows of `sequence_length` + 1 tokens that overlap by one.

    With S = sequence_length, row r covers stream[r S : r S + S + 1]: S inputs and, shifted by one, S targets, so every
    token but the first is a target once per epoch. The last incomplete row is left out. Ten tokens with S = 3:

        stream  0 1 2 3 4 5 6 7 8 9
        row 0   0 1 2 3
        row 1         3 4 5 6
        row 2               6 7 8 9

    Document boundaries: a row may span several documents, and a document several rows. The eos token that ends each
    document is the only mark: neither attention nor the DeltaNet state is reset there, and the model learns from the
    eos that what follows is new.

    Training visits the rows in an order shuffled anew for each epoch by (seed, epoch). `row(i)` counts from the
    beginning of training, across epochs, and depends on nothing else: a run resumes exactly from the number of rows
    seen, and any cut of a batch into micro-batches or ranks sees the same data.
    """

    def __init__(self, tokens: PackedTokens, sequence_length: int, seed: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.seed = seed
        self.rows_per_epoch = (tokens.total_tokens - 1) // sequence_length
        if self.rows_per_epoch < 1:
            raise UserError(
                f"{tokens.prefix}.bin has {tokens.total_tokens} tokens, fewer than the {sequence_length + 1} "
                "of one row: add text or lower sequence_length."
            )

    def row(self, index: int) -> TokenIds:
        """Row `index` of the training order, int64 [sequence_length + 1]."""
        epoch, position = divmod(index, self.rows_per_epoch)
        return self._stored_row(shuffled(position, self.rows_per_epoch, self.seed, epoch))

    def batch(self, first_row: int, rows: int, step: int = 1) -> "torch.Tensor":
        """`rows` rows of the training order from `first_row` on, every `step`-th, int64 [rows, sequence_length + 1]."""
        import torch

        return torch.from_numpy(np.stack([self.row(first_row + i * step) for i in range(rows)]))

    def in_order(self, first_row: int, rows: int) -> "torch.Tensor":
        """`rows` rows as they are stored, for evaluation, int64 [rows, sequence_length + 1].

        Raises IndexError beyond `rows_per_epoch`.
        """
        import torch

        return torch.from_numpy(np.stack([self._stored_row(first_row + i) for i in range(rows)]))

    def _stored_row(self, row: int) -> TokenIds:
        start = row * self.sequence_length
        return self.tokens.slice(start, start + self.sequence_length + 1)


def shuffled(position: int, size: int, seed: int, epoch: int) -> int:
    """Where `position` goes in a permutation of 0..size-1 that depends on (seed, epoch); no table is built.

    A Feistel network shuffles the numbers of 2b bits, for the least b >= 1 with 4^b >= size. In each round the halves
    (left, right) become (right, left XOR hash(round, right)), which can be undone whatever the hash: a bijection.
    Where the result is not below `size` it is put in again ("cycle walking"): that follows the cycle on which
    `position` lies to its next member below `size`, so a bijection of 0..size-1 remains. At most four tries on average.

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
