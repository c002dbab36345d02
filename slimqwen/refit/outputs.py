"""The matrices through which a layer's networks write into the residual stream: routed experts, shared ones, a dense MLP."""

from collections.abc import Iterable

from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.families.axes import Axis, axes_of
from slimqwen.families.family import Block, TensorSpec


def output_specs(checkpoint: Checkpoint, block: Block) -> list[TensorSpec]:
    """Return the tensors of a block whose rows are the residual channels and whose columns are neurons; the experts' come last.

    A token mixer's output projection is none of them: its columns are units within units.
    """
    return [
        spec
        for spec in checkpoint.specs.values()
        if spec.block.name == block.name
        and len(spec.dims) > 1
        and axes_of(spec.dims[-2]) == {checkpoint.family.hidden}
        and isinstance(spec.dims[-1], Axis)
    ]


def matrices_of(stored: Iterable[Tensor]) -> list[Tensor]:
    """Return views of the matrices [hidden, neurons] in tensors as they are stored, of which some stack experts."""
    return [matrix for tensor in stored for matrix in (tensor.unbind() if tensor.ndim == 3 else [tensor])]
