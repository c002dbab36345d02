"""Rows and prompts shared out among the ranks of a job, and what is measured on them added up again."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from slimqwen.data.stream import Batch
from slimqwen.losses.loss import LossSums
from slimqwen.parallel.job import Job


@dataclass(frozen=True)
class Share:
    """A rank's share of things in a row: the same number on every rank, since sharded models run on all ranks at once.

    numbers: of the things. own: how many of them count; the others, at the end, repeat the last thing to fill up.

    Of 5 things on 2 ranks: [0, 1, 2], all of which count, and [3, 4, 4], of which 2 do.
    """

    numbers: list[int]
    own: int

    @classmethod
    def of(cls, things: int, job: Job) -> "Share":
        """Return this rank's share; all of them alone."""
        rank, ranks = job.share
        each = -(-things // ranks)
        first = rank * each
        own = min(max(things - first, 0), each)
        return cls([min(first + i, things - 1) for i in range(each)], own)

    def rows(self, rows: Batch) -> Batch:
        """Return the share's rows of a text, of which those that do not count are padding."""
        if self.own == len(rows.tokens):
            return rows
        mask = torch.ones_like(rows.tokens, dtype=torch.bool) if rows.mask is None else rows.mask
        mask = mask[self.numbers]
        mask[self.own :] = False
        places = tuple(rows.places[number] for number in self.numbers) if rows.places else ()
        return Batch(rows.tokens[self.numbers], mask, places)


def total_losses(sums: LossSums, job: Job) -> LossSums:
    """Add up the loss terms of all ranks. All of them measure the same terms."""
    measured = {f.name: getattr(sums, f.name) for f in fields(sums) if getattr(sums, f.name) is not None}
    totals = job.total(torch.stack(list(measured.values())).cpu())
    return replace(sums, **dict(zip(measured, totals.unbind(), strict=True)))


def total_counts(counts: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
    """Add up the counts of all ranks, tensors of one shape by the same names on each; on the host."""
    if not counts:
        return {}
    totals = job.total(torch.stack(list(counts.values())).cpu())
    return dict(zip(counts, totals.unbind(), strict=True))
