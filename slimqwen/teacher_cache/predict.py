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
from slimqwen.core.stopwatch import Stopwatch
from slimqwen.data.stream import Batch
from slimqwen.layerwise.memory import allot
from slimqwen.layerwise.step import Step, embeddings, steps_of
from slimqwen.layerwise.weights import weights_of, without_weights
from slimqwen.model.device import aligned
from slimqwen.model.experts import STREAMED_EXPERTS
from slimqwen.model.model import HiddenStates, head_name, load

Advance = Callable[[int], None]


class Predictor(ABC):
    """A teacher that runs on the sequences of one shard after another.

    head: lm_head's weight, [vocab, hidden]. passes: how often it goes over each token.
    """

    head: Tensor
    passes: int

    @abstractmethod
    def hidden_states(self, shard: Batch, advance: Advance) -> Iterator[tuple[Batch, HiddenStates]]:
        """Pieces of the shard in its order, each with what goes into `head`; `advance` is told the positions done."""


class InMemory(Predictor):
    """All weights at once."""

    passes = 1

    def __init__(
        self, checkpoint: Checkpoint, *, with_mtp: bool, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = load(checkpoint.folder, dtype, device)
        self._with_mtp, self._batch_size, self._device = with_mtp, batch_size, device
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
        *,
        with_mtp: bool,
        batch_size: int,
        sequences: int,
        sequence_length: int,
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """sequences: of a shard. budget_bytes: memory for activations beside the hidden states."""
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._model = without_weights(checkpoint, dtype, device)
        self._steps = [step for step in steps_of(self._model) if with_mtp or step.number is not None]
        self.passes = len(self._steps)
        self._batch_size = batch_size
        held = (1 + with_mtp) * sequences * sequence_length * checkpoint.config["hidden_size"] * dtype.itemsize
        self._allotment = allot(
            checkpoint,
            parts=0,
            rows=sequences,
            sequence_length=sequence_length,
            batch_size=batch_size,
            budget_bytes=budget_bytes,
            dtype=dtype,
            device=device,
            beside_bytes=held,
        )
        self.head = aligned(checkpoint.read(head_name(checkpoint, self._model)).to(device, dtype))
        self._model.set_experts_implementation(STREAMED_EXPERTS)  # Transformers' own wants all of a layer at once
        say(
            f"layer by layer: the checkpoint is read once for every {sequences:,} sequences; it takes "
            f"{bytes_in_words(self._allotment.total_bytes + held)} of memory, {bytes_in_words(held)} of it for hidden states"
        )

    def hidden_states(self, shard: Batch, advance: Advance) -> Iterator[tuple[Batch, HiddenStates]]:
        hidden = embeddings(self._model, shard.tokens[:, :-1], self._dtype, torch.device("cpu"))
        mtp = None
        for step in self._steps:
            if step.number is None:
                mtp = hidden.clone()
                self._take(step, mtp, shard.tokens, advance)
            else:
                self._take(step, hidden, shard.tokens, advance)
        main = hidden.split(self._batch_size)
        drafts = [None] * len(main) if mtp is None else mtp.split(self._batch_size)
        for batch, states, draft in zip(shard.split(self._batch_size), main, drafts, strict=True):
            yield batch, HiddenStates(states.to(self._device), None if draft is None else draft.to(self._device))

    def _take(self, step: Step, hidden: Tensor, tokens: Tensor, advance: Advance) -> None:
        """All sequences through one layer, in place: `hidden` is [sequences, seq, hidden], `tokens` [sequences, seq + 1]."""
        rows_per_pass, rows_per_chunk = self._allotment.rows_per_pass, self._allotment.rows_per_chunk
        with weights_of(step.blocks, self._model, self._checkpoint, self._dtype, self._device, Stopwatch()):
            for states, ids in zip(hidden.split(rows_per_chunk), tokens.split(rows_per_chunk), strict=True):
                after = step.through(states.to(self._device), ids, rows_per_pass)
                for done, rows in zip(states.split(rows_per_pass), after.split(rows_per_pass), strict=True):
                    done.copy_(rows if step.norm is None else step.norm(rows))
                advance(ids[:, 1:].numel())


def fits(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, budget_bytes: int) -> bool:
    """Whether all weights fit into memory beside a budget for activations, and say so where they do not."""
    needed = dtype.itemsize * sum(prod(spec.shape) for spec in checkpoint.specs.values() if spec.part != "vision")
    available = available_bytes(device)
    if available is None or needed + budget_bytes <= available:
        return True
    say(
        f"layer by layer (--streaming): the teacher takes {bytes_in_words(needed)} in {str(dtype).removeprefix('torch.')}, and "
        f"{bytes_in_words(available)} of memory are free"
    )
    return False
