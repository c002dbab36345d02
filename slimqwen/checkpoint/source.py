"""Sources of tensors for a cut: by the names of a family's table, with the matrices of routed experts in either layout."""

from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from slimqwen.families.family import Block, Config, ExpertTable, Family, Layout, TensorSpec


class TensorSource(Protocol):
    """The tensors of one model: a checkpoint's weights, or tensors of the same names and shapes, such as AdamW's moments.

    layouts: block name -> layout of its experts. specs: tensor name -> its row of the table.
    """

    folder: Path
    family: Family
    config: Config
    layouts: dict[str, Layout]
    specs: dict[str, TensorSpec]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, on the CPU; a view of the file where that is possible."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        ...


class ExpertReader:
    """A reader of one block's routed experts, by the names in `ExpertTable.per_expert`, for either layout."""

    def __init__(self, source: TensorSource, block: Block) -> None:
        assert block.experts is not None, f"{block.name} routes to no experts"
        self._source = source
        self._prefix = block.prefix
        self._table: ExpertTable = block.experts
        self._is_stacked = source.layouts[block.name] == "fused"

    def stored_name(self, pattern: str, expert: int) -> str:
        """Return the name of the source's tensor that holds a matrix: its own, or the stacked one's."""
        holder = self._table.holder(pattern) if self._is_stacked else pattern.format(expert=expert)
        return self._prefix + holder

    def read(self, pattern: str, expert: int) -> torch.Tensor:
        """Return one matrix, [rows, columns], as a view of the source's tensor."""
        tensor = self._source.read(self.stored_name(pattern, expert))
        return tensor[expert][self._rows[pattern]] if self._is_stacked else tensor

    def read_joined(self, stacked: str, expert: int) -> list[torch.Tensor]:
        """Return an expert's rows of a stacked tensor, in order: one view, or one matrix per part."""
        if self._is_stacked:
            return [self._source.read(self._prefix + stacked)[expert]]
        return [self.read(pattern, expert) for pattern in self._table.fused[stacked]]

    @cached_property
    def _rows(self) -> dict[str, slice]:
        """The rows of each matrix in its stacked tensor."""
        sizes = self._source.family.sizes(self._source.config)
        return {pattern: self._table.rows(pattern, sizes) for pattern in self._table.per_expert}
