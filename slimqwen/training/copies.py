"""What several ranks have of a model, copies of it (`shard_ranks`) or whole tensors, must be equal to the bit: whether it is."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from slimqwen.core.errors import StageFailed
from slimqwen.parallel.ranks import Ranks

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def check_copies(tensors: Mapping[str, Tensor], ranks: Ranks, step: int) -> None:
    """Raise StageFailed, on all ranks, where the copies of a parameter or a moment differ after `step` steps.

    Each rank sums up the bits of what it has, as integers: a pass over its memory and eight bytes per tensor to send. All ranks
    must call it.
    """
    copied = {name: tensor for name, tensor in tensors.items() if _has_copies(tensor)}
    if ranks.mesh is None or not copied:
        return
    sums_of_bits = torch.stack([_sum_of_bits(tensor).to(ranks.mesh.device_type) for tensor in copied.values()])
    own = torch.stack([torch.tensor([_part(tensor) for tensor in copied.values()]), sums_of_bits.cpu()])
    everywhere = [torch.empty_like(own) for _ in range(ranks.size)]
    dist.all_gather(everywhere, own)  # on the host, by gloo
    parts, sums = torch.stack(everywhere).unbind(1)  # [ranks, tensors]
    expected = torch.zeros_like(sums).scatter_(0, parts, sums).gather(0, parts)
    differing = (sums != expected).any(0).nonzero().flatten().tolist()
    if not differing:
        return
    first = differing[0]
    rank = int((sums != expected)[:, first].nonzero()[0])
    having = (parts[:, first] == parts[rank, first]).nonzero().flatten().tolist()
    others = "" if len(differing) == 1 else f" and {len(differing) - 1:,} other tensors"
    raise StageFailed(
        f"the copies of the model differ after step {step}: {list(copied)[first]}{others}, of which the ranks {having} should have the "
        "same bits. One of them computes or sends wrongly. The state before is intact: leave out its machine, and give the same "
        "command to continue."
    )


def _has_copies(tensor: Tensor) -> bool:
    """Return whether several ranks have the same part of a tensor, or all of it."""
    if not isinstance(tensor, DTensor):
        return True
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return any(placement.is_replicate() and size > 1 for placement, size in sizes)


def _part(tensor: Tensor) -> int:
    """Return the number of this rank's part of a tensor: the same on all ranks that have the same part."""
    if not isinstance(tensor, DTensor):
        return 0
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    number = 0
    for place, placement, size in zip(coordinate, tensor.placements, tensor.device_mesh.shape, strict=True):
        if not placement.is_replicate():
            number = number * size + place
    return number


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's elements, read as integers of their size, modulo 2^64."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if is_traceable_wrapper_subclass(tensor):  # an 8-bit moment consists of codes and scales
        inner, _ = tensor.__tensor_flatten__()
        return torch.stack([_sum_of_bits(getattr(tensor, name)) for name in inner]).sum()
    return tensor.contiguous().view(INTEGERS[tensor.itemsize]).sum(dtype=torch.int64)
