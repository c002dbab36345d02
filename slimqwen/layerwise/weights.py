"""A model built without weights, and one layer's weights at a time put into it."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.source import ExpertReader
from slimqwen.core.stopwatch import Stopwatch
from slimqwen.families.axes import size
from slimqwen.families.family import Block
from slimqwen.model.device import aligned
from slimqwen.model.model import MtpCausalLM, weightless
from slimqwen.model.patching import overridden, override

ELSEWHERE = ("embedding", "vision")  # parts that no layer needs: embeddings are looked up in the file, row by row


def without_weights(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> MtpCausalLM:
    """Return the checkpoint's model without weights but for the embedding, which is the file's, memory-mapped."""
    model = weightless(checkpoint, dtype, device)
    decoder = model.backbone.get_decoder()
    table = next(
        spec
        for spec in checkpoint.specs.values()
        if spec.part == "embedding" and model.module_of(spec.name) is decoder.embed_tokens
    )
    override(decoder.embed_tokens, weight=checkpoint.read(table.name))
    return model


@contextmanager
def weights_of(
    blocks: Collection[Block],
    model: MtpCausalLM,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    watch: Stopwatch,
) -> Iterator[None]:
    """Put weights into the modules of these blocks while it is open, parameters in `dtype`; before and after they have none.

    On a CPU routed experts stay in the file, and each is read when it is computed.
    """
    with ExitStack() as stack:

        def put(name: str, tensor: Any) -> None:
            module = model.module_of(name)
            attribute = model.family.module_name(name, model.config).rpartition(".")[2]
            stack.enter_context(overridden(module, **{attribute: tensor}))  # the parameter stays, on the meta device

        for block in blocks:
            with watch:
                for name in dense_tensors(block):
                    put(name, aligned(checkpoint.read(name).to(device, held_dtype(model, name, dtype))))
            for name in block.experts.fused if block.experts else ():
                experts = ExpertsOnDisk(checkpoint, block, name, dtype, watch)
                put(block.prefix + name, experts if device.type == "cpu" else experts.stacked(device))
        yield


def dense_tensors(block: Block) -> list[str]:
    """Return the names of what a block's modules hold beside routed experts."""
    return [block.prefix + name for part, table in block.tables.items() if part not in ELSEWHERE for name in table]


def held_dtype(model: MtpCausalLM, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype` for a parameter, and the module's own dtype for a buffer (a router's correction bias)."""
    held: Tensor = getattr(model.module_of(name), name.rpartition(".")[2])
    return dtype if isinstance(held, nn.Parameter) else held.dtype


class ExpertsOnDisk:
    """Stand-in for a stacked parameter [experts, rows, columns]: `[expert]` reads that expert from the checkpoint.

    What it returns, [rows, columns] in `dtype`, is one buffer: valid until the next expert is read.
    """

    def __init__(self, checkpoint: Checkpoint, block: Block, fused: str, dtype: torch.dtype, watch: Stopwatch) -> None:
        assert block.experts is not None
        sizes = checkpoint.family.sizes(checkpoint.config)
        self._reader, self._watch = ExpertReader(checkpoint, block), watch
        self._fused = fused
        experts, rows, columns = (size(term, sizes) for term in block.experts.table("fused")[fused])
        self._experts = experts
        self._buffer = torch.empty(rows, columns, dtype=dtype)

    def __getitem__(self, expert: int) -> Tensor:
        with self._watch:
            row = 0
            for tensor in self._reader.read_joined(self._fused, expert):
                self._buffer[row : row + len(tensor)].copy_(tensor)
                row += len(tensor)
        return self._buffer

    def stacked(self, device: torch.device) -> Tensor:
        """Return all of them, stacked on a device."""
        stacked = torch.empty(self._experts, *self._buffer.shape, dtype=self._buffer.dtype, device=device)
        for expert in range(self._experts):
            stacked[expert].copy_(self[expert])
        return stacked
