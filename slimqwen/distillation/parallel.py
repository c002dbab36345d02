"""Many processes train one model: the ranks, their mesh, and every `fully_shard` call (PyTorch's FSDP2)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from slimqwen.errors import StageFailed, UserError
from slimqwen.modeling.model import MtpCausalLM

# A rank waits this long for the others before it gives up. The longest wait without an error is for rank 0 to bring a
# finished checkpoint to the disk. That a process died shows at once: its connections close, and torchrun sees it.
TIMEOUT = timedelta(minutes=10)
# How gloo and NCCL, whose errors have no types of their own for it, tell that another process is gone.
LOST_CONTACT = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "timed out",
    "remote process exited",
)


@dataclass(frozen=True)
class Ranks:
    """The processes that train together. Alone (`mesh` None) every method is the identity.

    All of them must call the same methods in the same order.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that speaks, logs and writes the result."""
        return self.rank == 0

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, on every rank with the same bits."""
        if self.mesh is None:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers; by way of the CPU, without waiting for the GPU's work."""
        if self.mesh is None:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Until every rank is here."""
        self.largest(0)

    def told(self, value: str | None = None) -> str | None:
        """What the first rank gives here, on every rank."""
        if self.mesh is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]


ALONE = Ranks()


@contextmanager
def join_ranks(device: torch.device, shard_ranks: int | None = None) -> Iterator[Ranks]:
    """The ranks that torchrun (or whatever sets RANK, WORLD_SIZE, MASTER_ADDR) started; one process otherwise.

    Args:
        device: this process's own (`resolve_device`).
        shard_ranks: ranks that share one copy of the model. None: all. Fewer, e.g. the GPUs of a node: the copies'
            gradients are summed across ("hybrid sharding"), and weights are gathered within the node only.

    Raises UserError where the ranks cannot be split so, StageFailed where another rank is gone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if shard_ranks is not None and size % shard_ranks:
        raise UserError(f"distil.shard_ranks {shard_ranks} does not divide the {size} ranks: choose a divisor.")
    rank = int(os.environ["RANK"])
    try:
        mesh = _mesh(device, size, shard_ranks or size)
        yield Ranks(rank, size, mesh)
    except RuntimeError as error:
        reason = next((words for words in LOST_CONTACT if words.lower() in str(error).lower()), None)
        if reason is None:
            raise
        raise StageFailed(
            f"rank {rank} has lost another rank, which ended or cannot be reached ({reason}). The last saved state is "
            "intact: see what the other rank said, and give the same command to continue."
        ) from error
    # After an error the process group is left to the end of the process: to destroy it may take a rank that is gone.
    dist.destroy_process_group()


def _mesh(device: torch.device, size: int, shard_ranks: int) -> DeviceMesh:
    """Join the other processes: a line of ranks, or rows of `shard_ranks`, each row with its copy of the model."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    if shard_ranks == size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (size // shard_ranks, shard_ranks), mesh_dim_names=("replicate", "shard"))


def shard(model: MtpCausalLM, ranks: Ranks, *, mixed_precision: bool, reshard_after_forward: bool) -> None:
    """Split every parameter over the ranks by its first dimension, and gather it, layer by layer, when it is used.

    Gradients are summed and not averaged: the loss is divided by the predictions of all ranks already.

    Args:
        mixed_precision: gather the float32 parameters in bfloat16; gradients are summed in float32.
        reshard_after_forward: drop a layer's gathered parameters after its forward pass, to gather them again for its
            backward pass. False takes the memory of the whole model and saves a third of the traffic.
    """
    policy = MixedPrecisionPolicy()
    if mixed_precision:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = [*model.backbone.get_decoder().layers, *(model.mtp.layers if model.mtp is not None else [])]
    for layer in layers:
        fully_shard(layer, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # Embedding, lm_head and what surrounds the layers stay gathered after the forward pass: the loss uses lm_head.
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=False)
    for module in (*layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum
