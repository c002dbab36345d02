"""Checkpoints in and out of a sharded model: a rank reads its own rows only, and no rank ever holds the whole model."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.shards import TensorInfo, plan_shards
from slimqwen.checkpoint.writer import CheckpointWriter
from slimqwen.model.model import MtpCausalLM, Rows, allocate, disk_tensor, fill, weightless
from slimqwen.parallel.ranks import Ranks, shard


def load_sharded(
    checkpoint: Checkpoint,
    ranks: Ranks,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trains: bool,
    reshard_after_forward: bool,
    frozen: Collection[str] = (),
    offloads: bool = False,
) -> MtpCausalLM:
    """Load a checkpoint (`model.load`) sharded over the ranks: built without weights, then each rank reads its own rows.

    trains: False freezes the parameters. True on a GPU computes in bfloat16 on parameters in `dtype`.
    frozen: names of parameters that are not trained all the same, and keep the dtype that they have on disk.
    offloads: keep the parameters in the host's memory.
    """
    model = weightless(checkpoint, dtype, device)
    model.requires_grad_(trains)
    mixed_precision = trains and device.type == "cuda"
    if frozen:
        model.freeze(frozen, checkpoint, torch.bfloat16 if mixed_precision else dtype)
    shard(
        model,
        ranks,
        mixed_precision=mixed_precision,
        reshard_after_forward=reshard_after_forward,
        offloads=offloads,
    )
    allocate(model, device, sharded_on=torch.device("cpu") if offloads else None)
    fill_own(model.held(), checkpoint)
    return model


def fill_own(held: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Fill tensors that may be sharded (`model.fill`): each rank reads its own rows."""
    fill(held, checkpoint, _own_rows)


def _own_rows(tensor: Tensor) -> Rows:
    """Return the rows of which this rank has a part, the number of the first of them, and which part."""
    if not isinstance(tensor, DTensor):
        return Rows(tensor)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    inner = tuple(slice(start, start + size) for start, size in zip(offset[1:], shape[1:], strict=True))
    return Rows(tensor.to_local(), offset[0], inner if tuple(shape[1:]) != tuple(tensor.shape[1:]) else ())


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or all its shards put together. Called by all ranks at once.

    `expert_ranks` cut a stack of experts before FSDP, whose dimension is the mesh's first, cuts what each rank has, by the same dimension of
    the tensor or another one (`sharded_dim`). This undoes one after the other, FSDP's first; `DTensor.full_tensor` fails where that cut is
    uneven.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    mesh, rows = tensor.device_mesh, tensor.to_local()
    cuts = [(number, cut) for number, cut in enumerate(tensor.placements) if cut != Replicate()]
    for position, (number, cut) in enumerate(cuts):
        assert mesh.mesh_dim_names is not None
        shape = list(tensor.shape)  # of what the later cuts leave
        for later, other in cuts[position + 1 :]:
            shape[_cut_dim(other)] //= mesh.size(later)
        part = torch.empty(shape, device="meta")
        line = mesh[mesh.mesh_dim_names[number]]
        placement = Shard(_cut_dim(cut))
        rows = DTensor.from_local(rows, line, [placement], shape=part.shape, stride=part.stride()).full_tensor()
    return rows


def _cut_dim(placement: Placement) -> int:
    """Return the dimension of the tensor that a placement which is not whole cuts."""
    dim: int = placement.dim  # type: ignore[attr-defined]
    return dim


class Gathered(Mapping[str, Tensor]):
    """Sharded tensors by name; one that is read is gathered, and kept until two others have been.

    Two, because a layer's experts, which lie on the disk one by one, come by turns out of two stacks.
    """

    def __init__(self, sharded: Mapping[str, Tensor]) -> None:
        self._sharded = sharded
        self._gathered: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._gathered:
            if len(self._gathered) == 2:
                del self._gathered[next(iter(self._gathered))]
            self._gathered[name] = whole(self._sharded[name].detach())
        return self._gathered[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sharded

    def __iter__(self) -> Iterator[str]:
        return iter(self._sharded)

    def __len__(self) -> int:
        return len(self._sharded)


@torch.no_grad()
def export(model: MtpCausalLM, folder: Path | None, like: Checkpoint) -> None:
    """Save a sharded model (`model.save`) in the layout and dtypes of `like`. Called by all ranks.

    folder: where the first rank writes; None on the others, which only give their shards.
    """
    family, config = like.family, like.config
    sizes = family.sizes(config)
    gathered = Gathered(model.held())
    planned = [TensorInfo(name, like.dtype(name), spec.shape) for name, spec in like.specs.items()]
    with CheckpointWriter(folder, planned) if folder is not None else nullcontext() as writer:
        for name, dtype, _ in (tensor for file in plan_shards(planned) for tensor in file.tensors):
            if like.specs[name].part == "vision":  # carried along: the language model does not hold it
                tensor = like.read(name)
            else:
                tensor = disk_tensor(like.specs[name], family, config, gathered, sizes)
            if writer is not None:
                writer.add(name, tensor.cpu().to(dtype))
        if writer is not None:
            stored = like.dtype(next(iter(like.specs)))
            writer.finish(family.to_disk({**config, "dtype": str(stored).removeprefix("torch.")}))
