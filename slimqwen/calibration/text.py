"""The sequences that calibration measures on: rows of every source, even and odd ones apart."""

from collections.abc import Iterator, Mapping
from copy import copy
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from slimqwen.artifacts import fingerprint_value
from slimqwen.calibration.statistics import HALVES, Part
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.core.warning import warn
from slimqwen.data.store import check_vocabulary, load_manifest, training_stream
from slimqwen.data.stream import RowStream
from slimqwen.layerwise.ranks import share_of

if TYPE_CHECKING:
    import torch

MOST_SAMPLES = 1 << 31  # with sequence_length tokens each they are counted in 64 bits
TRAINING_TEXT = "training"  # the name of the one source where a recipe names none


class CalibrationText:
    """`samples` sequences, spread evenly over `sources`: folders written by `slimqwen tokens` by their names, or the one.

    Of each source they are the first ones of the training order of `seed`, so distillation on it sees them too. Where
    samples do not divide evenly the first sources have one more.

    `tokens` is the number of tokens measured in each part, `fingerprint` changes with whatever changes the sequences, `first_row`
    is where a share begins.
    Raises UserError for tokens that `checkpoint` cannot read, names that would not be distinct in the statistics, and
    fewer samples than sources.
    """

    def __init__(
        self,
        sources: Path | Mapping[str, Path],
        checkpoint: Checkpoint,
        *,
        samples: int,
        sequence_length: int,
        seed: int,
    ) -> None:
        if isinstance(sources, Path):
            sources = {TRAINING_TEXT: sources}
        if samples > MOST_SAMPLES:
            raise UserError(
                f"{samples:,} samples are more than the {MOST_SAMPLES:,} that can be counted: lower calibration.samples."
            )
        if samples < len(sources):
            raise UserError(
                f"{samples} samples cannot be spread over {len(sources)} sources: raise calibration.samples."
            )
        self.first_row = 0
        self._streams: dict[str, RowStream] = {}
        self._rows: dict[str, int] = {}
        manifests = {}
        for number, (name, folder) in enumerate(sources.items()):
            if not name or "/" in name:
                raise UserError(f"'{name}' cannot be the name of a source: use a word without '/', NAME=FOLDER.")
            manifest = load_manifest(folder)
            check_vocabulary(manifest, folder, checkpoint.folder, checkpoint.config["vocab_size"])
            manifests[name] = manifest.model_dump(mode="json")
            self._streams[name] = training_stream(folder, sequence_length, seed)
            self._rows[name] = samples // len(sources) + (number < samples % len(sources))
        self._sequence_length = sequence_length
        self.fingerprint = fingerprint_value([manifests, self._rows, sequence_length, seed])
        parts = {
            Part(name, half): range(half, rows, 2)
            for name, rows in self._rows.items()
            for half in HALVES
            if half < rows
        }
        self._take(parts)

    def _take(self, parts: Mapping[Part, range]) -> None:
        """Have these rows of each part, by their numbers in the source."""
        self._parts = {part: rows for part, rows in parts.items() if rows}
        self.tokens = {part: len(rows) * self._sequence_length for part, rows in self._parts.items()}

    def share(self, rank: int, size: int) -> "CalibrationText":
        """Return the rows that one of `size` ranks measures (`share_of`), where the parts lie one after another."""
        share, own, first = copy(self), share_of(sum(self.sections), rank, size), 0
        parts = {}
        for part, rows in self._parts.items():
            parts[part] = rows[max(own.start - first, 0) : max(own.stop - first, 0)]
            first += len(rows)
        share._take(parts)
        share.first_row = self.first_row + own.start
        return share

    @property
    def sections(self) -> list[int]:
        """Rows of each part, in the order of `tokens`."""
        return [len(rows) for rows in self._parts.values()]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of all parts together, and tokens of a row."""
        return sum(self.sections), self._sequence_length + 1

    def part_at(self, row: int) -> Part:
        """Return the part of a row, where the parts lie one after another."""
        return self._locate(row)[0]

    def __getitem__(self, rows: slice) -> "torch.Tensor":
        """Read some rows of one part, int64 [rows, sequence_length + 1], where the parts lie one after another."""
        part, number = self._locate(rows.start)
        first = self._parts[part][number]
        return self._streams[part.source].batch(first, rows.stop - rows.start, step=2).tokens

    def _locate(self, row: int) -> tuple[Part, int]:
        """Return the part of a row, and the row's number in it."""
        for part, count in zip(self.tokens, self.sections, strict=True):
            if row < count:
                return part, row
            row -= count
        raise IndexError(row)

    def read(self) -> "tuple[torch.Tensor, list[Part]]":
        """Read all rows, int64 [rows, sequence_length + 1], and the part of each."""
        import torch

        batches = list(self.batches(max(self.sections)))
        return torch.cat([rows for _, rows in batches]), [part for part, rows in batches for _ in rows]

    def batches(self, batch_size: int) -> Iterator[tuple[Part, "torch.Tensor"]]:
        """Yield every row once, `batch_size` rows of one part at a time, int64 [rows, sequence_length + 1]."""
        for part, (first, end) in zip(self.tokens, pairwise(accumulate(self.sections, initial=0)), strict=True):
            for start in range(first, end, batch_size):
                yield part, self[start : min(start + batch_size, end)]

    def warn_where_short(self) -> None:
        """Warn where a source has fewer sequences than are measured."""
        for name, stream in self._streams.items():
            if stream.rows_per_epoch < self._rows[name]:
                warn(
                    f"note: '{name}' has {stream.rows_per_epoch:,} sequences of {stream.sequence_length:,} tokens, fewer than "
                    f"the {self._rows[name]:,} to measure: some are measured twice."
                )
