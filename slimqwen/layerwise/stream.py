"""A model walked layer by layer, and the text's hidden states on their way through it, which lie in a file."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.stopwatch import Stopwatch
from slimqwen.families.family import Block
from slimqwen.layerwise.experts import experts_on_disk
from slimqwen.layerwise.memory import Allotment
from slimqwen.layerwise.step import Step, embeddings, steps_of
from slimqwen.layerwise.weights import weights_of, without_weights
from slimqwen.model.model import head_name


def file_backed(path: Path, *shape: int) -> Tensor:
    """A float32 tensor of zeros that lies in a file: page cache, which the system takes back as it needs, and no memory."""
    count = int(torch.Size(shape).numel())
    return torch.from_file(str(path), shared=True, size=count, dtype=torch.float32).view(*shape)


class Counts(Protocol):
    """Progress that a walk reports to."""

    def advance(self, amount: int) -> None:
        """`amount` tokens more have gone through a layer."""


class Stream:
    """One of the two models.

    Hidden states are float32 [rows, seq, hidden] on the CPU, file-backed; layers compute in `dtype` on `device`, a few
    rows at a time.
    """

    def __init__(
        self, checkpoint: Checkpoint, tokens: Tensor, allotment: Allotment, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.checkpoint, self.tokens = checkpoint, tokens
        self.model = without_weights(checkpoint, dtype, device)
        self.steps = steps_of(self.model)
        self.shape = (len(tokens), tokens.shape[1] - 1, checkpoint.config["hidden_size"])
        self._allotment, self.dtype, self.device = allotment, dtype, device

    def without(self, layers: Collection[int]) -> "Stream":
        """The same model without some of its decoder layers, and without its MTP module."""
        other = copy(self)
        decoder = [step for step in self.steps if step.number is not None]
        other.steps = [step for step in decoder if step.number not in layers]
        if other.steps[-1] is not decoder[-1]:  # what follows the last layer follows the last that is left
            after = [block for block in decoder[-1].blocks if block.layer is None]
            last = other.steps[-1]
            other.steps[-1] = replace(last, blocks=[*last.blocks, *after], norm=decoder[-1].norm)
        return other

    def weights_of(self, step: Step) -> AbstractContextManager[None]:
        return weights_of(step.blocks, self.model, self.checkpoint, self.dtype, self.device, Stopwatch())

    def weights_after(self, step: Step) -> AbstractContextManager[None]:
        """The norm that follows the last decoder layer, alone."""
        after = [block for block in step.blocks if block.layer is None and not block.is_mtp]
        return weights_of(after, self.model, self.checkpoint, self.dtype, self.device, Stopwatch())

    def head(self) -> Tensor:
        """lm_head's weight, or the embedding that it is tied to, float32 [vocab, hidden] on the device."""
        return self.checkpoint.read(head_name(self.checkpoint, self.model)).to(self.device, torch.float32)

    def open(self, path: Path) -> Tensor:
        """The hidden states in a file."""
        return file_backed(path, *self.shape)

    def embed(self, path: Path) -> Tensor:
        """What goes into the first layer, written to a file."""
        hidden = self.open(path)
        for rows in self.passes():
            hidden[rows] = embeddings(self.model, self.tokens[rows, :-1], self.dtype, self.device).cpu().float()
        return hidden

    def advance(self, step: Step, hidden: Tensor, progress: Counts) -> None:
        """Through a layer as it is, in place, without the norm that may follow. The step's weights must be there."""
        block = moe_block(step)
        with nullcontext() if block is None else experts_on_disk(self.experts_of(block)):
            for rows in self._slices(self._allotment.rows_per_chunk):
                result = step.through(self.ready(hidden[rows]), self.tokens[rows], self._allotment.rows_per_pass)
                hidden[rows] = result.cpu().float()
                progress.advance(hidden[rows, :, 0].numel())

    def normed(self, step: Step, hidden: Tensor) -> None:
        """Through the norm that follows a layer, in place, if there is one."""
        if step.norm is not None:
            with self.weights_of(step):
                for rows in self.passes():
                    hidden[rows] = step.norm(self.ready(hidden[rows])).cpu().float()

    def passes(self) -> Iterator[slice]:
        return self._slices(self._allotment.rows_per_pass)

    def _slices(self, size: int) -> Iterator[slice]:
        return (slice(first, first + size) for first in range(0, len(self.tokens), size))

    def experts_of(self, block: Block) -> Any:
        """The module of a block's routed experts."""
        assert block.experts is not None
        return self.model.module_of(block.prefix + next(iter(block.experts.fused)))

    def ready(self, hidden: Tensor) -> Tensor:
        """Hidden states as the layers compute with them."""
        return hidden.to(self.device, self.dtype)


def moe_block(step: Step) -> Block | None:
    """The block of a step that routes to experts, if there is one."""
    return next((block for block in step.blocks if block.experts is not None), None)
