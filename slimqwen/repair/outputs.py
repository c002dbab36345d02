"""The matrices through which routed experts write into the residual stream: where the axis table has them, and on disk."""

import torch
from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.families.family import Block, Family, TensorSpec


def output_pattern(family: Family, block: Block) -> str:
    """The tensor of one expert, below the block, whose rows are the residual channels."""
    assert block.experts is not None
    (pattern,) = (name for name, dims in block.experts.per_expert.items() if dims[0] == family.hidden)
    return pattern


def stacked_name(family: Family, block: Block) -> str:
    """The stacked tensor that holds all experts' output matrices and nothing else."""
    assert block.experts is not None
    pattern = output_pattern(family, block)
    (name,) = (name for name, joined in block.experts.fused.items() if joined == (pattern,))
    return name


def output_matrices(checkpoint: Checkpoint, block: Block) -> Tensor:
    """All experts' output matrices of a block, a copy in the stored dtype, [experts, hidden, neurons]."""
    if checkpoint.layouts[block.name] == "fused":
        return checkpoint.read(block.prefix + stacked_name(checkpoint.family, block)).clone()
    pattern = block.prefix + output_pattern(checkpoint.family, block)
    experts = range(checkpoint.family.sizes(checkpoint.config)[checkpoint.family.expert])
    return torch.stack([checkpoint.read(pattern.format(expert=expert)) for expert in experts])


def is_output_matrix(family: Family, spec: TensorSpec) -> bool:
    """Whether a tensor of a checkpoint is an expert's output matrix, or all of a block's."""
    block = spec.block
    return block.experts is not None and spec.pattern in (output_pattern(family, block), stacked_name(family, block))
