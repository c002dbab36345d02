"""Many processes train one model: the ranks, their mesh, and every `fully_shard` call (PyTorch's FSDP2)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from slimqwen.core import torchrun
from slimqwen.core.errors import UserError
from slimqwen.model.model import MtpCausalLM
from slimqwen.parallel.expert_parallel import share_experts
from slimqwen.parallel.job import TIMEOUT, Job, join_job

PADDING = 1 / 16  # of a tensor's first dimension, up to which it is split by this dimension all the same


@dataclass(frozen=True)
class Ranks:
    """The processes that train together. Alone (`mesh` None, or of one process) every method is the identity.

    All of them must call the same methods in the same order.

    experts_mesh: the same ranks as routed experts lie on them, where ranks share these (`expert_ranks`): the dimensions
        "replicate", "shard", "expert", of which the last one's ranks have different experts.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    experts_mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints, logs and writes the result."""
        return self.rank == 0

    @property
    def copy_ranks(self) -> int:
        """The number of ranks that share one copy of the models."""
        return 1 if self.mesh is None else self.mesh["shard"].size()

    def device_of(self, model: nn.Module) -> torch.device:
        """Return the device that a model computes on, wherever its parameters lie."""
        if self.mesh is None or self.mesh.device_type == "cpu":
            return next(model.parameters()).device
        return torch.device("cuda", torch.cuda.current_device())

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, on every rank with the same bits."""
        if self.mesh is None:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers; by way of the CPU, without waiting for the GPU's work."""
        if self.mesh is None:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def begin_largest(self, number: int) -> Callable[[], int]:
        """Begin `largest`, and return a function that waits for its result: the exchange goes on while the caller works."""
        if self.mesh is None:
            return lambda: number
        found = torch.tensor(number)
        exchange = dist.all_reduce(found, dist.ReduceOp.MAX, async_op=True)

        def finish() -> int:
            exchange.wait()
            return int(found)

        return finish

    def wait(self) -> None:
        """Block until every rank has called this."""
        self.largest(0)

    def broadcast(self, value: str | None = None) -> str | None:
        """Return the first rank's `value`, on every rank."""
        if self.mesh is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]


ALONE = Ranks()


@contextmanager
def join_ranks(
    device: torch.device,
    shard_ranks: int | None = None,
    expert_ranks: int | None = None,
    *,
    offloads: bool = False,
) -> Iterator[Ranks]:
    """Join the ranks that torchrun (or whatever sets RANK, WORLD_SIZE, MASTER_ADDR) started (`join_job`), or be alone.

    Args:
        device: this process's own (`resolve_device`).
        shard_ranks: ranks that share one copy of the model. None: all. Fewer, e.g. the GPUs of a node: the copies'
            gradients are summed across ("hybrid sharding"), and weights are gathered within the node only.
        expert_ranks: ranks that share the routed experts of one copy, and exchange tokens. None or 1: experts are
            gathered like all other weights.
        offloads: make a mesh of one process too, by which FSDP keeps its weights in the host's memory (`shard`).

    Raises UserError where the ranks cannot be split so, StageFailed where another rank is gone.
    """
    size = torchrun.world_size()
    if size > 1:
        check_shares(size, shard_ranks, expert_ranks)
    with join_job(device) as job:
        if job.size == 1:
            with _mesh_of_one(device) if offloads else nullcontext() as mesh:
                yield ALONE if mesh is None else Ranks(mesh=mesh)
            return
        yield Ranks(job.rank, job.size, *_meshes(job, device, shard_ranks or job.size, expert_ranks or 1))


@contextmanager
def _mesh_of_one(device: torch.device) -> Iterator[DeviceMesh]:
    """Make a process group and a mesh of this process alone, for as long as it is open."""
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        yield init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))
    finally:
        dist.destroy_process_group()


def check_shares(size: int, shard_ranks: int | None, expert_ranks: int | None) -> None:
    """Raise UserError where `size` ranks cannot be split so (`join_ranks`)."""
    if shard_ranks is not None and size % shard_ranks:
        raise UserError(f"execution.shard_ranks {shard_ranks} does not divide the {size} ranks: choose a divisor.")
    copy_ranks = shard_ranks or size
    if expert_ranks is not None and copy_ranks % expert_ranks:
        raise UserError(
            f"execution.expert_ranks {expert_ranks} does not divide the {copy_ranks} ranks that share a copy of the model: "
            "choose a divisor."
        )


def _meshes(job: Job, device: torch.device, copy_ranks: int, expert_ranks: int) -> tuple[DeviceMesh, DeviceMesh | None]:
    """Arrange the ranks: a line of them, or rows of `copy_ranks`, each row with its copy of the model.

    The second mesh cuts each row into rows of `expert_ranks` (neighbours, for what they exchange); None without.
    """
    copies = job.size // copy_ranks
    if copies == 1:
        mesh = job.mesh(device.type, (job.size,), ("shard",))
    else:
        mesh = job.mesh(device.type, (copies, copy_ranks), ("replicate", "shard"))
    if expert_ranks == 1:
        return mesh, None
    shape = (copies, copy_ranks // expert_ranks, expert_ranks)
    return mesh, job.mesh(device.type, shape, ("replicate", "shard", "expert"))


def fully_sharded(model: nn.Module) -> FSDPModule:
    """Return `model` as what `shard` made of it."""
    assert isinstance(model, FSDPModule)
    return model


def shard(
    model: MtpCausalLM, ranks: Ranks, *, mixed_precision: bool, reshard_after_forward: bool, offloads: bool = False
) -> None:
    """Split every parameter over the ranks by one dimension (`sharded_dim`), and gather it, layer by layer, when it is used.

    Gradients are summed and not averaged: the loss is divided by the predictions of all ranks already.

    Weights that the family's code computes with in float32 (`Family.float32_tensors`: norms, A_log, dt_bias) stay whole on every
    rank where they are trained, or others are gathered in bfloat16, for they are few and small: 0.5 MB of SlimQwen-23A2B. Their
    gradients are summed once a step (`add_up_gradients`), where gathering them in float32 would take two collectives more per layer
    and forward pass, and three per backward pass.

    Args:
        mixed_precision: gather the float32 parameters in bfloat16; gradients are summed in float32.
        reshard_after_forward: drop a layer's gathered parameters after its forward pass, to gather them again for its
            backward pass. False takes the memory of the whole model and saves a third of the traffic.
        offloads: keep parameters and gradients in the host's memory, pinned where there is a GPU, and copy a layer's parameters
            to the device when it is gathered. An optimiser of such parameters computes on the CPU.
    """
    assert ranks.mesh is not None
    on_gpu = ranks.mesh.device_type == "cuda"
    offload_policy = CPUOffloadPolicy(pin_memory=on_gpu) if offloads else OffloadPolicy()
    wrap = partial(fully_shard, reshard_after_forward=reshard_after_forward, offload_policy=offload_policy)
    policy = MixedPrecisionPolicy()
    if mixed_precision:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    whole = {
        parameter
        for name, parameter in model.tensors().items()
        if isinstance(parameter, nn.Parameter)
        and (parameter.requires_grad or mixed_precision)
        and name.endswith(model.family.float32_tensors)
    }
    layers = [*model.backbone.get_decoder().layers, *(model.mtp.layers if model.mtp is not None else [])]
    experts = []
    if ranks.experts_mesh is not None:
        experts = share_experts(model, ranks.experts_mesh["expert"])
        copies = ranks.experts_mesh["replicate"].size()
        mesh = ranks.experts_mesh["shard"] if copies == 1 else ranks.experts_mesh["replicate", "shard"]
        # Layers get their input in bfloat16; a router's float32 gates must not be cast on their way to the experts.
        experts_policy = replace(policy, cast_forward_inputs=False)
        for module in experts:
            by_experts = partial(_placement, ranks=ranks.experts_mesh["shard"].size())
            wrap(module, mesh=mesh, mp_policy=experts_policy, shard_placement_fn=by_experts)
    settings: dict[str, Any] = {
        "mesh": ranks.mesh,
        "mp_policy": policy,
        "ignored_params": whole,
        "shard_placement_fn": partial(_placement, ranks=ranks.copy_ranks),
    }
    for layer in layers:
        wrap(layer, **settings)
    # Embedding, lm_head and what surrounds the layers stay gathered after the forward pass: the loss uses lm_head.
    wrap(model, reshard_after_forward=False, **settings)
    for module in (*experts, *layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    if experts:
        _prefetch(model, experts)


def sharded_dim(shape: Sequence[int], ranks: int) -> int:
    """Return the dimension by which a tensor is split over ranks: the first, unless its parts would be padded by more than PADDING.

    In the first dimension FSDP pads every part to the largest, so 256 experts on 512 ranks would take the memory and the traffic of
    512. Other dimensions must divide evenly, and a rank then reads all rows of a checkpoint's tensor to take its part of each.

    Examples: [256, 1024, 1536] on 512 ranks: 1; [151936, 1536] on 512 ranks, padded by 0.1 %: 0; [1, 1536] on 8 ranks: 1.
    """
    padded = -(-shape[0] // ranks) * ranks
    if padded <= shape[0] * (1 + PADDING):
        return 0
    return next((dim for dim, size in enumerate(shape) if dim > 0 and size % ranks == 0), 0)


def _placement(parameter: nn.Parameter, ranks: int) -> Shard:
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter  # what this rank has of shared experts
    return Shard(sharded_dim(own.shape, ranks))


def _prefetch(model: MtpCausalLM, experts: Iterable[nn.Module]) -> None:
    """Gather each layer's weights while the layer before it is computed, in the forward and the backward pass.

    FSDP gathers a layer when the host arrives at it, which is early enough where the host runs ahead of the device. Experts that ranks
    share make it wait in every block, for the sizes of what is exchanged: the next layer's gathering would begin only after that. The MTP
    module's layer is no part of the chain, since not every forward pass has one.
    """
    shared = {id(module) for module in experts}
    layers = list(model.backbone.get_decoder().layers)
    own = [[fully_sharded(module) for module in layer.modules() if id(module) in shared] for layer in layers]
    chain = [fully_sharded(layer) for layer in layers]
    fully_sharded(model).set_modules_to_forward_prefetch(chain[:1])
    for number, layer in enumerate(chain):
        layer.set_modules_to_forward_prefetch([*own[number], *chain[number + 1 : number + 2]])
        layer.set_modules_to_backward_prefetch([*own[number], *chain[max(number - 1, 0) : number]])


def reshard(model: torch.nn.Module) -> None:
    """Drop every gathered parameter, so that each is its shard again; nothing of a model that is whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def add_up_gradients(parameters: Iterable[torch.Tensor], ranks: Ranks) -> None:
    """Sum, over all ranks, the gradients of the parameters that are whole on each (`shard`); in one collective."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if ranks.mesh is None or not gradients:
        return
    totals = ranks.total(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = totals.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(own) for part, own in zip(parts, gradients, strict=True)])


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale gradients down to `max_norm`, the 2-norm of all of them on all ranks; return the norm before, a scalar on their device.

    `torch.nn.utils.clip_grad_norm_`, which refuses to add up what lies on different meshes.
    """
    by_mesh: dict[DeviceMesh | None, list[torch.Tensor]] = {}
    for parameter in parameters:
        by_mesh.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    norms = [_norm(group, mesh) for mesh, group in by_mesh.items()]
    total = get_total_norm(norms)
    if any(mesh is not None and mesh.ndim > 1 for mesh in by_mesh):
        # Added up over one dimension after another, by some ranks in another order: what they have copies of must stay equal.
        dist.all_reduce(total, dist.ReduceOp.MAX)
    for group in by_mesh.values():
        clip_grads_with_norm_(group, max_norm, total)
    return total


def _norm(parameters: Sequence[torch.Tensor], mesh: DeviceMesh | None) -> torch.Tensor:
    """Return the 2-norm of the gradients of parameters that lie on one mesh, in all its parts; mesh None: of whole ones.

    (DTensor's `full_tensor` does the same, with a warning of each rank where the parts lie along two dimensions.)
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm([part.to_local() if isinstance(part, DTensor) else part for part in gradients])
    if mesh is None or not gradients:
        return norm
    square = norm.square()
    assert isinstance(gradients[0], DTensor)
    for dim, placement in enumerate(gradients[0].placements):
        if not placement.is_replicate():
            dist.all_reduce(square, group=mesh.get_group(dim))
    return square.sqrt()
