"""The teacher's hidden states of many sequences: with all its weights in memory, or layer by layer."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
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
Pieces = Iterator[tuple[Batch, HiddenStates]]

# What an interruption may cost layer by layer: the shards of a pass are finished together, at its end. A pass of an 80B teacher
# reads 160 GB, half a minute at 5 GB/s: in passes this long reading does not count.
PASS_SECONDS = 1800.0
FREE_FRACTION = 0.5  # of the free memory, for hidden states by default; weights are read through the other half
CPU = torch.device("cpu")


class Predictor(ABC):
    """A teacher that runs on the sequences of some shards after those of others.

    head: lm_head's weight, [vocab, hidden]. passes: how often it goes over each token.
    """

    head: Tensor
    passes: int

    @abstractmethod
    def shards_at_once(self, left: int) -> int:
        """Return how many of the shards that are left are to go through it together."""

    @abstractmethod
    def hidden_states(self, shards: Sequence[Batch], advance: Advance) -> Iterator[Pieces]:
        """Yield for each shard its pieces in order, each with what goes into `head`; call `advance` with the positions done.

        The pieces of a shard, the same whatever other shards go with it, must be taken before those of the next.
        """


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

    def shards_at_once(self, left: int) -> int:
        return 1

    def hidden_states(self, shards: Sequence[Batch], advance: Advance) -> Iterator[Pieces]:
        return (self._pieces(shard, advance) for shard in shards)

    def _pieces(self, shard: Batch, advance: Advance) -> Pieces:
        for batch in shard.split(self._batch_size):
            yield batch, self._model(batch.tokens.to(self._device), with_mtp=self._with_mtp)
            advance(batch.tokens[:, 1:].numel())


class LayerByLayer(Predictor):
    """One layer's weights at a time, each layer on all sequences of a pass, whose hidden states are in memory meanwhile.

    So the checkpoint is read once per pass, of as many shards as the memory for hidden states holds; from the second on
    also of no more than take PASS_SECONDS by the pace of the one before. On a CPU no more than one expert is in memory.
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
        processes: int = 1,
    ) -> None:
        """Allot the memory beside the hidden states of a shard of `sequences` sequences. processes: that share the machine's."""
        self._batch_size, device = execution.batch_size, resolve_device(execution.device)
        held = (1 + with_mtp) * sequences * sequence_length * checkpoint.config["hidden_size"] * dtype.itemsize
        # What goes through a layer at once depends on the size of a shard and on nothing else: so do the bits of its records.
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
        self._shard_seconds: float | None = None
        room = execution.hidden_states_bytes
        if room is None:
            room = int(FREE_FRACTION * ((available_bytes(CPU) or 0) - allotment.total_bytes)) // processes
        self._most_shards: int = max(1, room // held)
        say(
            f"layer by layer: it takes {bytes_in_words(allotment.total_bytes)} of memory, and {bytes_in_words(held)} for each "
            f"{sequences:,} sequences that go through the layers together: at most {bytes_in_words(self._most_shards * held)}, or as "
            f"many as take {PASS_SECONDS / 60:.0f} minutes. The checkpoint is read once for these"
        )

    def shards_at_once(self, left: int) -> int:
        most = self._most_shards
        if self._shard_seconds is None:
            most = 1  # the pace is not known yet
        elif self._shard_seconds > 0:
            most = min(most, max(1, int(PASS_SECONDS / self._shard_seconds)))
        passes = math.ceil(left / most)
        return math.ceil(left / passes)  # passes of equal size

    def hidden_states(self, shards: Sequence[Batch], advance: Advance) -> Iterator[Pieces]:
        """Take the shards through every layer together, then yield one after another, batch by batch."""
        started = time.perf_counter()
        sizes = [len(shard.tokens) for shard in shards]
        stream = self._stream.on(torch.cat([shard.tokens for shard in shards]), sizes)
        hidden = stream.embed(torch.empty(stream.shape, dtype=stream.dtype))
        mtp = None
        for step in stream.steps:
            if step.number is None:
                mtp = torch.empty_like(hidden)
            with stream.weights_of(step):
                stream.advance(step, hidden, advance, out=mtp, with_norm=True)
        of_shards = hidden.split(sizes)
        drafts = [None] * len(shards) if mtp is None else mtp.split(sizes)
        for shard, main, draft in zip(shards, of_shards, drafts, strict=True):
            yield self._pieces(shard, main, draft)
        self._shard_seconds = (time.perf_counter() - started) / len(shards)

    def _pieces(self, shard: Batch, hidden: Tensor, mtp: Tensor | None) -> Pieces:
        device, main = self._stream.device, hidden.split(self._batch_size)
        drafts = [None] * len(main) if mtp is None else mtp.split(self._batch_size)
        for batch, states, draft in zip(shard.split(self._batch_size), main, drafts, strict=True):
            yield batch, HiddenStates(states.to(device), None if draft is None else draft.to(device))


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
