"""The batches of a training, each read by a thread while the step before it is computed."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from slimqwen.data.stream import Batch, RowStream
from slimqwen.parallel.ranks import Ranks


@dataclass(frozen=True)
class StepRows:
    """The rows of an optimiser step on all ranks, in the order of training."""

    first_row: int
    rows: int


@dataclass(frozen=True)
class StepBatch:
    """A rank's rows of a step. targets: predictions of the main and of the MTP head on the rows of all ranks."""

    batch: Batch
    targets: tuple[int, int]


class Batches:
    """Batches of one rank, which has every R-th of a step's rows where there are R ranks.

    What is read is a function of the rows alone: a step that was not read ahead, after a resume or a rollback, is read when
    it is taken. Where the device is a GPU batches lie in pinned memory, from which they are copied while it computes.
    """

    def __init__(self, stream: RowStream, ranks: Ranks, device: torch.device) -> None:
        self._stream = stream
        self._ranks = ranks
        self._pins = device.type == "cuda"
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[StepRows, Future[StepBatch]] | None = None

    def take(self, step: StepRows, following: StepRows | None) -> StepBatch:
        """Return the batch of a step, and begin to read that of the following one; None: there is none."""
        ahead, self._ahead = self._ahead, None
        found = ahead[1].result() if ahead is not None and ahead[0] == step else self._read(step)
        if following is not None:
            self._ahead = following, self._thread.submit(self._read, following)
        return found

    def _read(self, step: StepRows) -> StepBatch:
        size = self._ranks.size
        batch = self._stream.batch(step.first_row + self._ranks.rank, step.rows // size, size)
        targets = self._stream.count_targets(step.first_row, step.rows)
        return StepBatch(batch.pin() if self._pins else batch, targets)
