"""How much memory tensors took: the most that was alive at one time, to the byte."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


@dataclass
class Peak:
    """`extra_bytes`: the most tensor bytes alive at one time, beyond those that were alive before. Known at the end."""

    extra_bytes: int = 0


@contextmanager
def measured_peak(device: torch.device) -> Iterator[Peak]:
    """Measure what is done while it is open, failures included.

    On a GPU by PyTorch's own allocator. On a CPU by looking at every operation's results, which takes some
    microseconds each; what an operation allocates and frees within itself is not seen.
    """
    peak = Peak()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield peak
        finally:
            peak.extra_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    counter = LiveStorages()
    try:
        with counter:
            yield peak
    finally:
        peak.extra_bytes = counter.most


class LiveStorages(TorchDispatchMode):
    """Adds up the storages that operations make, until they are gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = 0
        self.seen: set[int] = set()  # id() of storages that are alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tree_map_only(torch.Tensor, lambda tensor: self._see(tensor, is_new=False), (args, kwargs))
        result = func(*args, **kwargs)
        tree_map_only(torch.Tensor, lambda tensor: self._see(tensor, is_new=True), result)
        return result

    def _see(self, tensor: torch.Tensor, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self.seen:
            return
        self.seen.add(id(storage))
        size = storage.nbytes() if is_new else 0  # what an operation is given for the first time was there before
        weakref.finalize(storage, self._forget, id(storage), size)
        self.live += size
        self.most = max(self.most, self.live)

    def _forget(self, storage: int, size: int) -> None:
        self.seen.discard(storage)
        self.live -= size
