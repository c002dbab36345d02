"""The teacher's hidden states of many sequences: with all its weights in memory, or layer by layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.free_memory import available_bytes
from slimqwen.core.progress import say
from slimqwen.data.stream import Batch
from slimqwen.layerwise.memory import allot
from slimqwen.layerwise.stream import Stream
from slimqwen.model.device import aligned, resolve_device
from slimqwen.model.model import HiddenStates, load
from slimqwen.recipe import Execution

Advance = Callable[[int], None]


class Predictor(ABC):
    """A teacher that runs on the sequences of one shard after another.

    head: lm_head's weight, [vocab, hidden]. passes: how often it goes over each token.
    """

    head: Tensor
    passes: int

    @abstractmethod
    def hidden_states(self, shard: Batch, advance: Advance) -> Iterator[tuple[Batch, HiddenStates]]:
        """Yield pieces of the shard in its order, each with what goes into `head`; call `advance` with the positions done."""


class InMemory(Predictor):
    """All weights at once."""

    passes = 1

    def __init__(self, checkpoint: Checkpoint, execution: Execution, *, with_mtp: bool, dtype: torch.dtype) -> None:
        self._with_mtp, self._batch_size, self._device = (
            with_mtp,
            execution.batch_size,
            resolve_device(execution.device),
        )
        self._model = load(checkpoint.folder, dtype, self._device)
        self.head = self._model.head

    def hidden_states(self, shard: Batch, advance: Advance) -> Iterator[tuple[Batch, HiddenStates]]:
        for batch in shard.split(self._batch_size):
            yield batch, self._model(batch.tokens.to(self._device), with_mtp=self._with_mtp)
            advance(batch.tokens[:, 1:].numel())


class LayerByLayer(Predictor):
    """One layer's weights at a time, each layer on all sequences of a shard, whose hidden states are in memory meanwhile.

    So the checkpoint is read once per shard: larger shards read less. On a CPU no more than one expert is in memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        execution: Execution,
        *,
        with_mtp: bool,
        sequences: int,
        sequence_length: int,
        dtype: torch.dtype,
    ) -> None:
        """Allot the memory beside the hidden states of a shard of `sequences` sequences."""
        self._batch_size, device = execution.batch_size, resolve_device(execution.device)
        held = (1 + with_mtp) * sequences * sequence_length * checkpoint.config["hidden_size"] * dtype.itemsize
        allotment = allot(
            checkpoint,
            execution,
            rows=sequences,
            sequence_length=sequence_length,
            dtype=dtype,
            beside_bytes=held,
        )
        no_text = torch.empty(0, sequence_length + 1, dtype=torch.int64)
        stream = Stream(checkpoint, no_text, allotment, dtype, device, hidden_dtype=dtype)
        self._stream = stream if with_mtp else stream.without(())
        self.passes = len(self._stream.steps)
        self.head = aligned(stream.read_head(dtype))
        say(
            f"layer by layer: the checkpoint is read once for every {sequences:,} sequences; it takes "
            f"{bytes_in_words(allotment.total_bytes + held)} of memory, {bytes_in_words(held)} of it for hidden states"
        )

    def hidden_states(self, shard: Batch, advance: Advance) -> Iterator[tuple[Batch, HiddenStates]]:
        """Take the whole shard through every layer, then yield it batch by batch."""
        stream = self._stream.on(shard.tokens)
        hidden = stream.embed(torch.empty(stream.shape, dtype=stream.dtype))
        mtp = None
        for step in stream.steps:
            if step.number is None:
                mtp = torch.empty_like(hidden)
            with stream.weights_of(step):
                stream.advance(step, hidden, advance, out=mtp, with_norm=True)
        main = hidden.split(self._batch_size)
        drafts = [None] * len(main) if mtp is None else mtp.split(self._batch_size)
        for batch, states, draft in zip(shard.split(self._batch_size), main, drafts, strict=True):
            yield batch, HiddenStates(states.to(stream.device), None if draft is None else draft.to(stream.device))


def fits(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, budget_bytes: int, processes: int = 1
) -> bool:
    """Return whether all weights fit into memory beside a budget for activations; print it where they do not.

    processes: of this machine, on a CPU each with weights of its own.
    """
    models = processes if device.type == "cpu" else 1
    needed = dtype.itemsize * sum(prod(spec.shape) for spec in checkpoint.specs.values() if spec.part != "vision")
    available = available_bytes(device)
    if available is None or models * (needed + budget_bytes) <= available:
        return True
    of_each = f" for each of {models} processes" if models > 1 else ""
    say(
        f"layer by layer (--streaming): the teacher takes {bytes_in_words(needed)} in {str(dtype).removeprefix('torch.')}{of_each}, "
        f"and {bytes_in_words(available)} of memory are free"
    )
    return False
