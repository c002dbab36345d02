"""The expert counts of an optimiser step, which the load-balancing loss multiplies the routers' probabilities with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimqwen.losses.balance import counts_by_portion
from slimqwen.model.routing import Routing
from slimqwen.parallel.ranks import Ranks
from slimqwen.recipe import BalancingCounts


class StepCounts:
    """Expert counts of one optimiser step, in the order of its rows.

    The rows of a step, in the order of training, lie in portions of `portion_rows`; of R ranks the first has rows 0, R, 2 R, ..., the
    second 1, R + 1, ... The probabilities of a row meet the counts of all rows up to the end of its portion. arXiv 2501.11873 keeps such
    a buffer over the micro-batches of a step; here the portions are the recipe's, so that the loss is the same however a
    step is cut into micro-batches and ranks. Six rows in portions of two on one rank, three at a time:

        row                 0    1    2    3    4    5
        portion             0    0    1    1    2    2
        meets counts of     0-1  0-1  0-3  0-3  0-5  0-5      row 2 needs row 3, of the next micro-batch: counted ahead

    Ranks take part in the same calls with the same numbers of rows.
    """

    def __init__(self, ranks: Ranks, setting: BalancingCounts, step_rows: int) -> None:
        """step_rows: rows of the step on all ranks."""
        self._ranks = ranks
        self._step_rows = step_rows
        self._portion_rows = step_rows if setting.kind == "exact" else min(setting.rows, step_rows)
        self._rows = 0  # of this rank, that have met their counts
        self._before: Tensor | None = None  # [blocks, experts], the counts of all ranks' rows before
        self._counted = 0  # of this rank, counted ahead
        self._ahead: Tensor | None = None  # [portions, blocks, experts], up to the end of each portion

    def needs_counting_ahead(self, micro_batch_rows: int) -> bool:
        """Return whether a portion of rows ends in a later micro-batch than it begins in, of so many rows on each rank."""
        rows = micro_batch_rows * self._ranks.size
        return rows < self._step_rows and rows % self._portion_rows != 0

    def note(self, micro_batch_rows: int) -> str | None:
        """Return a note where micro-batches of so many rows on each rank make steps count ahead; None elsewhere."""
        if not self.needs_counting_ahead(micro_batch_rows):
            return None
        return (
            f"every step makes one more forward pass of the student, to count its experts: {micro_batch_rows * self._ranks.size} of its "
            f"{self._step_rows} sequences go through the model at one time, which is no multiple of the {self._portion_rows} that "
            "distil.load_balancing_counts has in a portion"
        )

    def count_ahead(self, routing: Sequence[Routing], mask: Tensor, rows: int) -> None:
        """Count the next `rows` rows of the step, before any of them meets its counts; arguments as of `meet`."""
        own = self._count(
            routing, mask, self._portions(self._counted, rows, mask.device), -(-self._step_rows // self._portion_rows)
        )
        self._ahead = own if self._ahead is None else self._ahead + own
        self._counted += rows
        if self._counted * self._ranks.size == self._step_rows:
            self._ahead = self._ranks.total(self._ahead).cumsum(0)

    def meet(self, routing: Sequence[Routing], mask: Tensor, rows: int) -> list[Tensor]:
        """Return the counts that the next `rows` rows meet, per block: [rows, experts], or [1, experts] where all meet the same.

        routing: per block, of these rows; mask: [tokens] bool, True at real tokens. Nothing waits for the device.
        """
        first = self._rows * self._ranks.size // self._portion_rows
        end = -(-(self._rows + rows) * self._ranks.size // self._portion_rows)
        portions = self._portions(self._rows, rows, mask.device) - first
        if self._ahead is None:
            own = self._ranks.total(self._count(routing, mask, portions, end - first))
            counts = own.cumsum(0) if self._before is None else own.cumsum(0) + self._before
            self._before = counts[-1]
        else:
            counts = self._ahead[first:end]
        self._rows += rows
        if len(counts) > 1:
            counts = counts.index_select(0, portions)
        return list(counts.unbind(1))

    def _portions(self, first: int, rows: int, device: torch.device) -> Tensor:
        """Return the portion of each of this rank's rows from `first` on, [rows] int64."""
        numbers = torch.arange(first, first + rows, device=device) * self._ranks.size + self._ranks.rank
        return numbers // self._portion_rows

    @staticmethod
    def _count(routing: Sequence[Routing], mask: Tensor, portions: Tensor, num_portions: int) -> Tensor:
        """Count the experts of all blocks by portion: [portions, blocks, experts]."""
        experts = torch.stack([seen.experts for seen in routing])
        return counts_by_portion(experts, mask, portions, num_portions, routing[0].logits.shape[-1])
