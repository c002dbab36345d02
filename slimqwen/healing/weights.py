"""The weights of one layer as tensors that train, and as the checkpoint stores them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.families.family import Block
from slimqwen.layerwise.step import Step
from slimqwen.layerwise.stream import Stream
from slimqwen.layerwise.weights import ExpertsOnDisk, dense_tensors
from slimqwen.model.patching import has_parameter, override


@contextmanager
def trainable_weights(stream: Stream, step: Step) -> Iterator[dict[str, Tensor]]:
    """Put the layer's weights in float32 on the stream's device while it is open, as leaves that require a gradient.

    Yields them by their names: a checkpoint's, but for routed experts, which are stacked, [experts, rows, columns]. Norms
    and heads around the layer are there too, and do not train; buffers (a router's correction bias) do not either.
    """
    model, device = stream.model, stream.device
    with stream.weights_of(step, torch.float32):
        leaves: dict[str, Tensor] = {}
        for block in trained_blocks(step):
            for name in [*dense_tensors(block), *stacked_experts(block)]:
                module = model.module_of(name)
                attribute = model.family.module_name(name, model.config).rpartition(".")[2]
                if not has_parameter(module, attribute):
                    continue
                current: Any = getattr(module, attribute)
                start = current.stacked(device) if isinstance(current, ExpertsOnDisk) else current.clone()
                leaves[name] = start.requires_grad_()
                # The stream's own override ends with the block: one of this would keep its tensor beside the leaf.
                override(module, **{attribute: leaves[name]})
        yield leaves


def trained_blocks(step: Step) -> list[Block]:
    """Return the layer's own blocks, without the norm and the heads around the last one."""
    return [block for block in step.blocks if block.layer is not None or block.is_mtp]


def stacked_experts(block: Block) -> list[str]:
    """Return the names of the block's routed experts as the module holds them, stacked."""
    return [block.prefix + name for name in (block.experts.fused if block.experts else ())]


def stored_names(checkpoint: Checkpoint, step: Step, name: str) -> list[str]:
    """Return a tensor's names in the checkpoint: its own, or of stacked experts the parts' with `{expert}` in them."""
    if name in checkpoint.specs:
        return [name]
    block = next(block for block in trained_blocks(step) if name in stacked_experts(block))
    assert block.experts is not None
    return [block.prefix + part for part in block.experts.fused[name.removeprefix(block.prefix)]]


def round_as_stored(checkpoint: Checkpoint, step: Step, trained: Mapping[str, Tensor]) -> None:
    """Round the tensors to the dtype that the checkpoint will keep of them, in place."""
    for name, tensor in trained.items():
        kept = stored_names(checkpoint, step, name)[0].format(expert=0)
        tensor.data.copy_(tensor.data.to(checkpoint.dtype(kept)))


def stored_tensors(checkpoint: Checkpoint, step: Step, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the trained tensors by their names in the checkpoint, in its dtypes, on the CPU: experts apart where it has them so."""
    result: dict[str, Tensor] = {}
    for name, tensor in trained.items():
        names = stored_names(checkpoint, step, name)
        if names == [name]:
            result[name] = tensor
            continue
        for expert, rows in enumerate(tensor):
            parts = [part.format(expert=expert) for part in names]
            sizes = [checkpoint.specs[part].shape[0] for part in parts]
            result |= zip(parts, rows.split(sizes), strict=True)
    return {
        name: tensor.detach().to("cpu", checkpoint.dtype(name), copy=True).contiguous()
        for name, tensor in result.items()
    }
