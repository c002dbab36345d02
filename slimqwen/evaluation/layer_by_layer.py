"""A model that is measured layer by layer, because its weights do not fit into memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.progress import Progress, say
from slimqwen.data.stream import Batch
from slimqwen.evaluation.acceptance import judge_drafts
from slimqwen.evaluation.examinee import Examinee
from slimqwen.evaluation.fidelity import Recording, shares_of
from slimqwen.layerwise.memory import allot
from slimqwen.layerwise.step import Step
from slimqwen.layerwise.stream import Stream, Visitor, moe_block
from slimqwen.losses.balance import expert_counts
from slimqwen.losses.loss import align
from slimqwen.model.device import aligned
from slimqwen.model.routing import Routing, observe_routing
from slimqwen.parallel.job import Job
from slimqwen.recipe import Execution


class LayerByLayer(Examinee):
    """A model with the weights of one layer in memory at a time, each layer on all rows or prompts before the next is read.

    Each rank of the job reads the whole checkpoint, for rows and prompts of its own.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        job: Job,
        execution: Execution,
    ) -> None:
        """Allot the memory. shape: of the text, how many rows and how many positions of each."""
        rows, length = shape
        self.has_mtp = checkpoint.has_mtp
        held = (1 + self.has_mtp) * rows * length * checkpoint.config["hidden_size"] * dtype.itemsize
        allotment = allot(checkpoint, execution, rows=rows, sequence_length=length, dtype=dtype, beside_bytes=held)
        no_text = torch.empty(0, length + 1, dtype=torch.int64)
        self._stream = Stream(checkpoint, no_text, allotment, dtype, device, hidden_dtype=dtype)
        self._head = aligned(self._stream.read_head(dtype))
        self._batch_size, self._job = execution.batch_size, job

    def record(self, rows: Batch, title: str) -> Recording:
        stream, (checkpoint, device) = self._stream, (self._stream.checkpoint, self._stream.device)
        blocks = checkpoint.family.moe_blocks(checkpoint.config)
        counts = {block.name: torch.zeros(checkpoint.config["num_experts"], dtype=torch.int64) for block in blocks}
        # Which predictions count, [rows, seq]: that takes no hidden states.
        mask = align(rows.tokens, rows.tokens[:, 1:, None], mask=rows.mask).main_mask.view(len(rows.tokens), -1)
        total = rows.tokens[:, 1:].numel() * len(stream.steps)
        with (
            observe_routing(stream.model, blocks) as seen,
            Progress(title, total=total, unit="token-layers") as progress,
        ):
            counting = _Counting(seen, counts, mask)
            main, mtp = self._run(rows.tokens, stream.steps, progress.advance, counting)
        batches, states = rows.to(device).split(self._batch_size), main.split(self._batch_size)
        drafts = [None] * len(states) if mtp is None else [part.to(device) for part in mtp.split(self._batch_size)]
        predictions = [
            align(batch.tokens, hidden.to(device), draft, batch.mask)
            for batch, hidden, draft in zip(batches, states, drafts, strict=True)
        ]
        return Recording(predictions, self._head, shares_of(counts, self._job))

    def batches(self, prompts: Tensor) -> Sequence[Tensor]:
        return [prompts]  # the weights are read once more for each batch

    def continue_greedily(self, prompts: Tensor, new_tokens: int, count: Callable[[int], None]) -> Tensor:
        """Continue prompts without a cache: for each new token all of them go through all layers, and the weights are read once."""
        size = sum(file.stat().st_size for file in self._stream.checkpoint.model_files)
        say(
            f"layer by layer the checkpoint is read once for each of {new_tokens} new tokens: {new_tokens} times "
            f"{bytes_in_words(size)}"
        )
        sequences = prompts.cpu()
        for _ in range(new_tokens):
            last = self._states(sequences)[:, -1].to(self._stream.device)
            sequences = torch.cat([sequences, (last @ self._head.T).argmax(-1, keepdim=True).cpu()], dim=1)
            count(len(sequences))
        return sequences

    def accepted_drafts(self, sequences: Tensor, prompt_tokens: int, depth: int) -> Tensor:
        mtp = self._stream.steps[-1]
        assert mtp.number is None, "there is no MTP module to draft with"

        def draft(hidden: Tensor, k: int) -> Tensor:
            stream, out = self._stream.on(sequences[:, k:]), torch.empty_like(hidden)
            with stream.weights_of(mtp):
                stream.advance(mtp, hidden.cpu(), _count_nothing, out=out, with_norm=True)
            return out

        judged = sequences.to(self._stream.device)
        hidden = self._states(sequences[:, :-1]).to(self._stream.device)
        return judge_drafts(hidden, draft, self._head, judged, prompt_tokens, depth)

    def tokens_per_verification(self, prompts: Tensor, new_tokens: int, title: str) -> float | None:
        say(f"{title}: not measured layer by layer, where every verification would read the checkpoint")
        return None

    def _states(self, tokens: Tensor) -> Tensor:
        """Return the backbone's final hidden states of tokens [rows, length], [rows, length, hidden], on the host."""
        decoder = [step for step in self._stream.steps if step.number is not None]
        return self._run(F.pad(tokens, (0, 1)), decoder, _count_nothing, Visitor())[0]

    def _run(
        self, tokens: Tensor, steps: Sequence[Step], count: Callable[[int], None], visitor: Visitor
    ) -> tuple[Tensor, Tensor | None]:
        """Take rows of tokens [rows, seq + 1] through layers; return the backbone's hidden states and the MTP module's, if it is there."""
        stream = self._stream.on(tokens)
        hidden = stream.embed(torch.empty(stream.shape, dtype=stream.dtype))
        mtp = None
        for step in steps:
            if step.number is None:
                mtp = torch.empty_like(hidden)
            with stream.weights_of(step):
                stream.advance(step, hidden, count, out=mtp, visitor=visitor, with_norm=True)
        return hidden, mtp


def _count_nothing(_tokens: int) -> None:
    pass


class _Counting(Visitor):
    """Adds up, by block, how often each expert was chosen for a prediction that counts.

    seen: the routing of the last forward pass, by block. mask: [rows, seq], True where a prediction counts.
    """

    def __init__(self, seen: dict[str, Routing], counts: dict[str, Tensor], mask: Tensor) -> None:
        self._seen, self._counts, self._mask = seen, counts, mask
        self._rows = slice(0)

    @contextmanager
    def chunk(self, rows: slice) -> Iterator[None]:
        """Note which rows go through the layer."""
        self._rows = rows
        yield

    def receive(self, step: Step, before: Tensor, after: Tensor) -> None:
        """Count the choices of the layer's router."""
        block = moe_block(step)
        if block is not None:
            counts, mask = self._counts[block.name], self._mask[self._rows].flatten()
            counts += expert_counts(self._seen[block.name].experts.cpu(), mask, len(counts))
