"""The sequences that calibration measures on: rows of every source, even and odd ones apart."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slimqwen.artifacts import fingerprint_value
from slimqwen.calibration.statistics import HALVES, Part
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.core.warning import warn
from slimqwen.data.store import check_vocabulary, load_manifest, training_stream
from slimqwen.data.stream import RowStream

if TYPE_CHECKING:
    import torch

MOST_SAMPLES = 1 << 31  # with sequence_length tokens each they are counted in 64 bits
TRAINING_TEXT = "training"  # the name of the one source where a recipe names none


class CalibrationText:
    """`samples` sequences, spread evenly over `sources` (name -> folder written by `slimqwen tokens`).

    Of each source they are the first ones of the training order of `seed`, so distillation on it sees them too. Where
    samples do not divide evenly the first sources have one more.

    `tokens` is the number of tokens measured in each part, `fingerprint` changes with whatever changes the sequences.
    Raises UserError for tokens that `checkpoint` cannot read, names that cannot be told apart in the statistics, and
    fewer samples than sources.
    """

    def __init__(
        self, sources: Mapping[str, Path], checkpoint: Checkpoint, *, samples: int, sequence_length: int, seed: int
    ) -> None:
        if samples > MOST_SAMPLES:
            raise UserError(
                f"{samples:,} samples are more than the {MOST_SAMPLES:,} that can be counted: lower calibration.samples."
            )
        if samples < len(sources):
            raise UserError(
                f"{samples} samples cannot be spread over {len(sources)} sources: raise calibration.samples."
            )
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
        self.fingerprint = fingerprint_value([manifests, self._rows, sequence_length, seed])
        self.tokens = {
            Part(name, half): len(range(half, rows, 2)) * sequence_length
            for name, rows in self._rows.items()
            for half in HALVES
            if half < rows
        }

    def batches(self, batch_size: int) -> Iterator[tuple[Part, "torch.Tensor"]]:
        """Every row once, `batch_size` rows of one part at a time, int64 [rows, sequence_length + 1]."""
        for part in self.tokens:
            rows = range(part.half, self._rows[part.source], 2)
            for first in range(0, len(rows), batch_size):
                count = min(batch_size, len(rows) - first)
                yield part, self._streams[part.source].batch(rows[first], count, step=2).tokens

    def say_what_is_short(self) -> None:
        """Tell the user where a source has fewer sequences than are measured."""
        for name, stream in self._streams.items():
            if stream.rows_per_epoch < self._rows[name]:
                warn(
                    f"note: '{name}' has {stream.rows_per_epoch:,} sequences of {stream.sequence_length:,} tokens, fewer than "
                    f"the {self._rows[name]:,} to measure: some are measured twice."
                )
