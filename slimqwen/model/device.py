"""Which device and dtype to compute on, from the recipe's words."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slimqwen.core.errors import UserError, shown
from slimqwen.core.torchrun import local_rank

ALLOCATOR_VARIABLES = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"
ALIGNMENT_BYTES = 64  # where the memory that PyTorch allocates on a CPU begins


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; 'auto' is a GPU if there is one, and of the processes that torchrun starts on a machine, each has the GPU of its number.

    Raises UserError for a device that this machine or PyTorch lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (number := local_rank()) is not None:
        name = f"cuda:{number}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            use_expandable_segments()
        torch.ones(2, device=device).sum().item()  # `meta` has tensors too, and computes nothing
    except Exception as error:  # each of PyTorch's backends has its own class for "not here"
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"device {shown(name)} cannot be used here ({reason}): try execution.device: auto.") from error
    return device


def use_expandable_segments() -> None:
    """Set PyTorch's allocator of GPU memory to segments that grow, unless the environment has settings of it.

    Of segments of fixed sizes some memory stays in pieces that are too small for what is asked for later. PyTorch reads the variable
    when it allocates on a GPU for the first time; after that this does nothing. What it saves was not measured yet.
    """
    if not torch.cuda.is_initialized() and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; 'auto' is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself, or a copy of it where it does not begin at a multiple of 64 bytes, as all memory of PyTorch does.

    Tensors that are mapped from a safetensors file begin at any multiple of 8. On some processors (AMD's) MKL takes another
    path through such a product, which then differs in the last bits: the same weights in another file, or in memory, gave
    other logits.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Make the same work on the same CPU with the same number of threads give the same bits while open: resumed is uninterrupted.

    By default PyTorch's parallel `index_put_` adds in whatever order its threads come along (seen with two threads: the
    gradient of gathering tokens for their experts). The ordered version cost nothing measurable on two cores. On a GPU
    the setting is left alone: there it slows kernels down and some have no ordered version.

    Another number of threads, another processor or another release of PyTorch splits sums in other places. Results are then
    equal to rounding only, which training amplifies: 0.3 % of the final loss of a short run, between one thread and two.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
