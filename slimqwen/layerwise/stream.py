"""One model on one text: one layer has its weights at a time, and the text's hidden states go through layer after layer."""

import errno
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.stopwatch import Stopwatch
from slimqwen.families.family import Block
from slimqwen.layerwise.memory import Allotment
from slimqwen.layerwise.step import Step, embed_tokens, steps_of
from slimqwen.layerwise.weights import weights_of, without_weights
from slimqwen.model.experts import STREAMED_EXPERTS
from slimqwen.model.model import head_name

NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL)  # of a file system that cannot reserve space


def create_file_backed(path: Path, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of zeros that lies in a new file: page cache, which the system takes back as it needs, and no memory.

    Raises OSError where the disk has no room for it: a mapped page without one would kill the process by SIGBUS.
    """
    count = int(torch.Size(shape).numel())
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        if count:
            os.posix_fallocate(descriptor, 0, count * dtype.itemsize)
    except OSError as error:
        if error.errno not in NO_FALLOCATE:
            raise
    finally:
        os.close(descriptor)
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(*shape)


def file_of(path: Path, rows: slice) -> Path:
    """Return the name of the file with the hidden states of some of a text's rows: `path` and their numbers, `NAME.0-128`."""
    return path.with_name(f"{path.name}.{rows.start}-{rows.stop}")


def _within(rows: slice, first: int) -> slice:
    return slice(rows.start - first, rows.stop - first)


class Rows(Protocol):
    """The rows of a text, int64 [rows, seq + 1]: a tensor, or an object that reads them when they are needed."""

    @property
    def shape(self) -> Sequence[int]:
        """Rows, and tokens of a row."""

    def __getitem__(self, rows: slice) -> Tensor:
        """Return some of them, which never span two sections of the stream's text."""


class Visitor:
    """What happens beside the forward pass while a text goes through a layer. This one does nothing."""

    def chunk(self, rows: slice) -> AbstractContextManager[None]:
        """Return a context that stays open while these rows go through the layer and the norm that may follow."""
        return nullcontext()

    def receive(self, step: Step, before: Tensor, after: Tensor) -> None:
        """Receive a chunk's hidden states before and after the layer, [rows, seq, hidden], without the norm that may follow."""


class Stream:
    """One model, without weights but for the layer under way, and the rows of one text.

    Hidden states are tensors [rows, seq, hidden] in `hidden_dtype` on the CPU, in memory or file-backed; layers compute in
    `dtype` on `device`, a few rows at a time. `reading` and `writing` count the seconds spent on weights and on hidden states.

    sections: the numbers of rows, one after another, that go through a layer apart from each other. Default: all rows together.
    first_row: the number of the first of these rows in the whole text, of which other ranks have other rows; `place` has the
    numbers of all of them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: Rows,
        allotment: Allotment,
        dtype: torch.dtype,
        device: torch.device,
        hidden_dtype: torch.dtype = torch.float32,
        sections: Sequence[int] | None = None,
        first_row: int = 0,
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.model = without_weights(checkpoint, dtype, device)
        self.model.set_experts_implementation(STREAMED_EXPERTS)  # Transformers' own reads all of a layer's at once
        self.steps = steps_of(self.model)
        self.reading, self.writing = Stopwatch(), Stopwatch()
        self._allotment, self._hidden_dtype = allotment, hidden_dtype
        self._set_text(tokens, sections, first_row)

    def _set_text(self, tokens: Rows, sections: Sequence[int] | None = None, first_row: int = 0) -> None:
        rows, length = tokens.shape
        self.tokens = tokens
        self.place = slice(first_row, first_row + rows)
        self.shape = (rows, length - 1, self.checkpoint.config["hidden_size"])
        self._sections = [rows] if sections is None else sections
        assert sum(self._sections) == rows

    def on(self, tokens: Rows, sections: Sequence[int] | None = None) -> "Stream":
        """Return the same model on another text."""
        other = copy(self)
        other._set_text(tokens, sections)
        return other

    def without(self, layers: Collection[int]) -> "Stream":
        """Return the same model without some of its decoder layers, and without its MTP module."""
        other = copy(self)
        decoder = [step for step in self.steps if step.number is not None]
        other.steps = [step for step in decoder if step.number not in layers]
        if other.steps[-1] is not decoder[-1]:  # what follows the last layer follows the last that is left
            after = [block for block in decoder[-1].blocks if block.layer is None]
            last = other.steps[-1]
            other.steps[-1] = replace(last, blocks=[*last.blocks, *after], norm=decoder[-1].norm)
        return other

    def weights_of(self, step: Step, dtype: torch.dtype | None = None) -> AbstractContextManager[None]:
        """Return a context in which the step has its weights, in `dtype` or else the stream's."""
        return self._weights(step.blocks, dtype)

    def weights_after(self, step: Step) -> AbstractContextManager[None]:
        """Return a context in which the norm that follows the last decoder layer has its weights, and the layer has none."""
        return self._weights([block for block in step.blocks if block.layer is None and not block.is_mtp])

    def _weights(self, blocks: Collection[Block], dtype: torch.dtype | None = None) -> AbstractContextManager[None]:
        return weights_of(blocks, self.model, self.checkpoint, dtype or self.dtype, self.device, self.reading)

    def read_head(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read lm_head's weight, or the embedding that it is tied to, [vocab, hidden] on the device."""
        return self.checkpoint.read(head_name(self.checkpoint, self.model)).to(self.device, dtype)

    def create(self, path: Path) -> Tensor:
        """Create a file for the hidden states of these rows, `path` with their numbers, and return them, zeros."""
        return create_file_backed(file_of(path, self.place), *self.shape, dtype=self._hidden_dtype)

    def open(self, path: Path, into: Tensor | None = None) -> Tensor:
        """Return the hidden states of these rows in the files of `path` that one rank or several created.

        One file with just these rows is mapped, for reading: what is written to them does not reach it. Of others the rows are
        copied, into `into` or memory.

        Raises FileNotFoundError where a row is in no file.
        """
        own = file_of(path, self.place)
        if own.exists():
            return self._map(own, self.shape)
        result = torch.empty(self.shape, dtype=self._hidden_dtype) if into is None else into
        found = 0
        for file in path.parent.glob(f"{path.name}.*"):
            first, end = map(int, file.suffix[1:].split("-"))
            both = slice(max(first, self.place.start), min(end, self.place.stop))
            if both.start < both.stop:
                rows = self._map(file, (end - first, *self.shape[1:]))
                result[_within(both, self.place.start)] = rows[_within(both, first)]
                found += both.stop - both.start
        if found != self.shape[0]:
            raise FileNotFoundError(f"{path} lacks {self.shape[0] - found} of {self.shape[0]} rows")
        return result

    def _map(self, file: Path, shape: Sequence[int]) -> Tensor:
        count = int(torch.Size(shape).numel())
        return torch.from_file(str(file), shared=False, size=count, dtype=self._hidden_dtype).view(*shape)

    def flush(self, path: Path) -> None:
        """Bring the hidden states that were created at `path` to the disk, so that the processes of other machines read them."""
        descriptor = os.open(file_of(path, self.place), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Remove the hidden states that were created at `path`."""
        file_of(path, self.place).unlink(missing_ok=True)  # ranks without a row share a name

    def embed(self, hidden: Tensor) -> Tensor:
        """Write what goes into the first layer to `hidden`, and return it."""
        for rows in self.passes():
            hidden[rows] = embed_tokens(self.model, self.tokens[rows][:, :-1], self.dtype, hidden.device).to(
                hidden.dtype
            )
        return hidden

    def advance(
        self,
        step: Step,
        hidden: Tensor,
        count: Callable[[int], None],
        *,
        out: Tensor | None = None,
        visitor: Visitor | None = None,
        with_norm: bool = False,
    ) -> None:
        """Take the text through one layer, whose weights must be there: from `hidden` to `out`, or in place.

        Args:
            count: called with the number of tokens that went through the layer.
            with_norm: through the norm that may follow, too.
        """
        out = hidden if out is None else out
        visitor = visitor or Visitor()
        rows_per_pass = self._allotment.rows_per_pass
        for rows in self._slices(self._allotment.rows_per_chunk):
            with visitor.chunk(rows):
                before = self.prepare(hidden[rows])
                after = step.through(before, self.tokens[rows], rows_per_pass)
                visitor.receive(step, before, after)
                if with_norm and step.norm is not None:
                    for some in after.split(rows_per_pass):
                        some.copy_(step.norm(some))
            with self.writing:
                out[rows] = after.to(out.device, out.dtype)
            count(after.shape[0] * after.shape[1])

    def apply_norm(self, step: Step, hidden: Tensor) -> None:
        """Take the text through the norm that follows a layer, in place, if there is one."""
        if step.norm is not None:
            with self.weights_of(step) if step.number is None else self.weights_after(step):
                for rows in self.passes():
                    hidden[rows] = step.norm(self.prepare(hidden[rows])).to(hidden.device, hidden.dtype)

    def passes(self) -> Iterator[slice]:
        """Yield the rows that go through a token mixer at once, over the whole text."""
        return self._slices(self._allotment.rows_per_pass)

    def _slices(self, size: int) -> Iterator[slice]:
        for first, end in pairwise(accumulate(self._sections, initial=0)):
            for start in range(first, end, size):
                yield slice(start, min(start + size, end))

    def experts_of(self, block: Block) -> Any:
        """Return the module of a block's routed experts."""
        assert block.experts is not None
        return self.model.module_of(block.prefix + next(iter(block.experts.fused)))

    def prepare(self, hidden: Tensor) -> Tensor:
        """Convert hidden states to the device and dtype that the layers compute with."""
        return hidden.to(self.device, self.dtype)


def moe_block(step: Step) -> Block | None:
    """Return the block of a step that routes to experts, if there is one."""
    return next((block for block in step.blocks if block.experts is not None), None)
