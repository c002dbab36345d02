"""The weights of one layer as tensors that train, and as the checkpoint stores them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimqwen.calibration.step import Step
from slimqwen.calibration.stopwatch import Stopwatch
from slimqwen.calibration.weights import ExpertsOnDisk, dense_tensors, weights_of
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.families.family import Block
from slimqwen.layerwise.stream import Stream


@contextmanager
def trainable_weights(stream: Stream, step: Step) -> Iterator[dict[str, Tensor]]:
    """While open, the step's layer has its weights in float32 on the stream's device, as leaves that ask for a gradient.

    Yields them by their names: a checkpoint's, but for routed experts, which are stacked, [experts, rows, columns]. Norms
    and heads around the layer are there too, and do not train; buffers (a router's correction bias) do not either.
    """
    model, checkpoint, device = stream.model, stream.checkpoint, stream.device
    with weights_of(step.blocks, model, checkpoint, torch.float32, device, Stopwatch()):
        leaves: dict[str, Tensor] = {}
        for block in trained_blocks(step):
            for name in [*dense_tensors(block), *stacked_experts(block)]:
                module, attribute = (
                    model.module_of(name),
                    model.family.module_name(name, model.config).rpartition(".")[2],
                )
                if not isinstance(module._parameters.get(attribute), nn.Parameter):
                    continue
                lent = vars(module)[attribute]
                start = lent.stacked(device) if isinstance(lent, ExpertsOnDisk) else lent.clone()
                leaves[name] = vars(module)[attribute] = start.requires_grad_()
        yield leaves


def trained_blocks(step: Step) -> list[Block]:
    """The layer's own, without the norm and the heads around the last one."""
    return [block for block in step.blocks if block.layer is not None or block.is_mtp]


def stacked_experts(block: Block) -> list[str]:
    return [block.prefix + name for name in (block.experts.fused if block.experts else ())]


def stored(checkpoint: Checkpoint, step: Step, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors by their names in the checkpoint, in its dtypes: experts one by one where it has them so."""
    result = {}
    for name, tensor in trained.items():
        if name in checkpoint.specs:
            result[name] = tensor.detach().to("cpu", checkpoint.dtype(name), copy=True).contiguous()
            continue
        block = next(block for block in trained_blocks(step) if name in stacked_experts(block))
        assert block.experts is not None
        joined = [block.prefix + part for part in block.experts.fused[name.removeprefix(block.prefix)]]
        for expert, rows in enumerate(tensor.detach()):
            names = [part.format(expert=expert) for part in joined]
            sizes = [checkpoint.specs[part].shape[0] for part in names]
            for part, of_part in zip(names, rows.split(sizes), strict=True):
                result[part] = of_part.to("cpu", checkpoint.dtype(part), copy=True).contiguous()
    return result


def rounded_as_stored(checkpoint: Checkpoint, step: Step, trained: Mapping[str, Tensor]) -> None:
    """Round the leaves to the dtype that the checkpoint will keep of them, in place."""
    for name, tensor in trained.items():
        kept = name if name in checkpoint.specs else next(iter(stored_names(checkpoint, step, name)))
        tensor.data.copy_(tensor.data.to(checkpoint.dtype(kept)))


def stored_names(checkpoint: Checkpoint, step: Step, name: str) -> list[str]:
    """Names in the checkpoint of what makes the stacked experts `name`, of the first expert."""
    block = next(block for block in trained_blocks(step) if name in stacked_experts(block))
    assert block.experts is not None
    return [block.prefix + part.format(expert=0) for part in block.experts.fused[name.removeprefix(block.prefix)]]
