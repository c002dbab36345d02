"""One rank of many on fake tensors: what its work would send, launch, wait for and keep in memory, counted without doing it.

PyTorch's fake process group takes part in every collective and moves nothing; fake tensors have shapes, dtypes and no data. So
the code that really trains runs with true shapes at any number of ranks, in seconds and a few hundred megabytes. The tensors are
on the CPU: a build of PyTorch without CUDA cannot differentiate on another device.

Counted, and exact: the collectives with their bytes, and the calls of ATen's functions that would launch a kernel. A call may
launch more than one kernel: a sort, or a product that is split. Kernels that Python code would launch by itself (flash-linear-attention's)
are not there; `DELTA_RULE` stands for them. Live bytes are those of all tensors, without an allocator's rounding and fragments.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # shapes of collectives, for fake tensors
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers.models.qwen3_next import modeling_qwen3_next

from slimqwen.losses import loss, softmax
from slimqwen.parallel import expert_parallel

ROOT = Path(__file__).parent.parent
aten = torch.ops.aten

# flash-linear-attention's gated delta rule by chunks launches these many kernels (read from its source, release 0.4; nothing was
# run): l2 norm of queries and keys, cumulative sum, k k^T, its triangular inverse, w and u, the states, the outputs; backward: w and u
# and the states again, four kernels of gradients, cumulative sum, both norms, and two additions.
FORWARD_KERNELS, BACKWARD_KERNELS = 8, 11
CHUNK = 64  # tokens of its chunks: it keeps a [tokens, heads, CHUNK] tensor for the backward pass

KINDS = {
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "alltoall": "all-to-all",
    "all_to_all": "all-to-all",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "broadcast": "broadcast",
}
NO_KERNEL = {
    "aten::detach",
    "aten::_unsafe_view",
    "aten::alias",
    "aten::lift_fresh",
    "aten::set_",
    "aten::promote_types",
    "prim::device",
}


@dataclass
class Counts:
    """Counts of what was done while a trace was open.

    collectives, received_bytes: by kind, and by the number of ranks in the group. The bytes are what a GPU receives from others:
        of a group of n, (n - 1) / n of the gathered, exchanged or scattered tensor, and twice that of one that is all-reduced (as
        in a ring, which sends as much).
    launches: calls of functions that launch a kernel, collectives included.
    synchronisations: reads of a value by the host, by the function of slimqwen that made them.
    peak_bytes: the most bytes of tensors alive at one time. order: gathers and modules (`note`) as they came.
    """

    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)
    received_bytes: Counter[tuple[str, int]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    synchronisations: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0
    order: list[str] = field(default_factory=list)

    def received(self, kind: str, ranks: int | None = None) -> int:
        """Return the bytes received in collectives of this kind, of groups of `ranks` if given."""
        return sum(n for (found, size), n in self.received_bytes.items() if found == kind and ranks in (None, size))


class Tracing(TorchDispatchMode):
    """Counts what is called while it is open, and answers for values that fake tensors do not have.

    Every token counts as a target, a flag that decides whether something is skipped is False, and experts get equally many tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.live = 0
        self._sizes: dict[int, int] = {}  # bytes of the storages that are alive, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            self._synchronise()
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.nonzero.default:  # as if all were true
            self._synchronise()
            result = args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        elif func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self._synchronise()
            result = aten.clone.default(args[0])
        else:
            result = func(*args, **kwargs)
        if func in collective_ops:
            self._collect(func, result, args, kwargs)
        elif _launches(func):
            self.counts.launches[func._schema.name] += _kernels(func)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                for storage in get_untyped_storages(leaf):
                    self.see(storage)
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        """Count a storage at the size that it has now."""
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
            self._sizes[key] = 0
        size = storage.nbytes()
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self.counts.peak_bytes = max(self.counts.peak_bytes, self.live)

    def note(self, event: str) -> None:
        """Enter an event between the collectives."""
        self.counts.order.append(event)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def _collect(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        if func in sync_ops:
            return
        name = func._schema.name.split("::")[1].removeprefix("_")
        kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), name)
        size = CollectiveOp.get_process_group(func, args).size()
        if kind == "all-to-all":  # what it returns; the sizes are balanced
            received = result if isinstance(result, Tensor) else args[0]
            found = received.numel() * received.itemsize
        elif kind == "all-gather":
            found = args[0].numel() * args[0].itemsize if name.startswith("allgather_base") else _bytes_of(result)
        elif kind == "reduce-scatter":
            source = args[1] if name.startswith("reduce_scatter_base") else args[0]
            found = source.numel() * source.itemsize
        else:
            found = 2 * _bytes_of(args[0]) if kind == "all-reduce" else _bytes_of(args[0])
        self.counts.collectives[kind, size] += 1
        self.counts.received_bytes[kind, size] += found * (size - 1) // size
        self.counts.launches[f"collective: {kind}"] += 1
        self.note(kind)

    def _synchronise(self) -> None:
        self.counts.synchronisations[_place()] += 1


def _bytes_of(tree: Any) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _place() -> str:
    """Return the innermost function of slimqwen that is running, as `training/trainer.py: step`."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "slimqwen"):
            return f"{path.relative_to(ROOT / 'slimqwen')}: {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def _launches(func: Any) -> bool:
    name = func._schema.name
    if name in NO_KERNEL or name.startswith("profiler::") or func.is_view:
        return False
    return not any(word in name for word in ("::empty", "::new_empty", "_backend", "::sym_"))


def _kernels(func: Any) -> int:
    return {"fake_ranks::delta_rule": FORWARD_KERNELS, "fake_ranks::delta_rule_backward": BACKWARD_KERNELS}.get(
        func._schema.name, 1
    )


@contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    """Be rank 0 of `size` ranks while open."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _ones(shape: Sequence[int]) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


def _really(function: Any) -> Any:
    """Wrap a function that computes with real tensors wherever it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


@contextmanager
def tracing() -> Iterator[Tracing]:
    """Trace what is done while open, on fake tensors."""
    trace = Tracing()

    def followed(resize: Any) -> Any:  # FSDP frees and allocates gathered weights by resizing their storage
        def resize_and_see(tensor: Tensor) -> None:
            resize(tensor)
            trace.see(tensor.untyped_storage())

        return resize_and_see

    def balanced(sent: Tensor, received: Tensor, rows: int) -> tuple[list[int], list[int]]:
        trace._synchronise()
        each, rest = divmod(rows, len(sent))
        sizes = [each + (rank < rest) for rank in range(len(sent))]
        return sizes, sizes

    def read(tensor: Tensor) -> Any:  # all numbers of a tensor at once: one wait
        trace._synchronise()
        return _ones(tensor.shape)

    with ExitStack() as stack:
        for name in ("alloc_storage", "free_storage"):
            stack.enter_context(patch.object(fsdp_param, name, followed(getattr(fsdp_param, name))))
        stack.enter_context(patch.object(expert_parallel, "read_row_counts", balanced))
        stack.enter_context(patch.object(FakeTensor, "tolist", read))
        for name in ("__init__", "__getitem__"):  # of a mesh, which counts ranks by tensors
            stack.enter_context(patch.object(DeviceMesh, name, _really(getattr(DeviceMesh, name))))
        stack.enter_context(_stand_ins())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(trace)
        yield trace


# --- a kernel of which only the shapes exist --------------------------------------------------------------------------


@torch.library.custom_op("fake_ranks::delta_rule", mutates_args=())
def _delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("fake tensors only")


@_delta_rule.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), v.new_empty(*v.shape[:3], CHUNK)


@torch.library.custom_op("fake_ranks::delta_rule_backward", mutates_args=())
def _delta_rule_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, inverse: Tensor
) -> list[Tensor]:
    raise NotImplementedError("fake tensors only")


@_delta_rule_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, inverse: Tensor) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (q, k, v, g, beta)]


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        output, inverse = _delta_rule(*inputs)
        ctx.save_for_backward(*inputs, inverse)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(_delta_rule_backward(grad, *ctx.saved_tensors))


def _chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **_: Any) -> tuple[Tensor, None]:
    return _DeltaRule.apply(q, k, v, g, beta), None


@contextmanager
def _stand_ins() -> Iterator[None]:
    blocks = partial(softmax.block_rows, on_cpu=False)
    with (
        patch.object(modeling_qwen3_next, "torch_chunk_gated_delta_rule", _chunk_gated_delta_rule),
        patch.object(softmax, "block_rows", lambda vocab, rows, on_cpu: blocks(vocab, rows)),
        patch.object(loss, "heads_together", lambda device: True),
    ):
        yield
