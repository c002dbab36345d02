"""Rows of one document each, so that no document attends to another."""

import numpy as np

from slimqwen.core.errors import UserError
from slimqwen.data.packed import TokenIds, bin_path
from slimqwen.data.stream import StoredRows

# One first row is kept in memory for this many documents; the rest are counted on demand.
DOCUMENTS_PER_ENTRY = 1024


class DocumentStream(StoredRows):
    """Rows that each hold one document, or one piece of a document longer than a row.

    With S = sequence_length, a document of L tokens is cut as `TokenStream` cuts the whole stream: piece p covers its
    tokens p S .. p S + S, overlapping by one, and the last piece ends with the document, shorter or not. So every token
    but the first of each document is a target once per epoch, none is left out, and a document of one token, which
    has no target, has no row. S = 3, documents A B C D E and X Y:

        row 0   A B C D
        row 1         D E
        row 2   X Y

    The rest of a row is padding (`Batch.mask`). The model sees nothing before a row, neither by attention nor by the
    DeltaNet state, on any kernel. Memory: 8 bytes for every 1,024 documents.
    """

    def _count(self) -> tuple[int, int]:
        documents, rows, targets = self.tokens.documents, [0], 0
        for first in range(0, documents, DOCUMENTS_PER_ENTRY):
            lengths = np.diff(self._boundaries(first))
            rows.append(rows[-1] + int(self._pieces(lengths).sum()))
            targets += int(np.maximum(lengths - 1, 0).sum())
        self._first_rows = np.array(rows[:-1])
        if rows[-1] < 1:
            raise UserError(f"{bin_path(self.tokens.prefix)} has no document of two tokens or more: add text.")
        return rows[-1], targets

    def _bounds(self, row: int) -> tuple[int, int]:
        if not 0 <= row < self.rows_per_epoch:
            raise IndexError(f"row {row} of {self.tokens.prefix}, which has {self.rows_per_epoch}")
        entry = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        boundaries = self._boundaries(entry * DOCUMENTS_PER_ENTRY)
        ends = np.cumsum(self._pieces(np.diff(boundaries)))
        within = row - int(self._first_rows[entry])
        document = int(np.searchsorted(ends, within, side="right"))
        pieces_before_the_end = int(ends[document]) - within
        pieces = int(self._pieces(boundaries[document + 1] - boundaries[document]))
        start = int(boundaries[document]) + (pieces - pieces_before_the_end) * self.sequence_length
        return start, min(start + self.sequence_length + 1, int(boundaries[document + 1]))

    def _boundaries(self, first: int) -> TokenIds:
        """Return the boundaries of the documents of one entry."""
        return self.tokens.boundaries(first, min(first + DOCUMENTS_PER_ENTRY, self.tokens.documents))

    def _pieces(self, lengths: TokenIds) -> TokenIds:
        """Return the rows per document: ceil((length - 1) / sequence_length), 0 where there is no target."""
        return (np.maximum(lengths, 1) + self.sequence_length - 2) // self.sequence_length
