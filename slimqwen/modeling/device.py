"""Which device and dtype to compute on, from the recipe's words."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slimqwen.errors import UserError


def resolve_device(name: str) -> torch.device:
    """'auto' is a GPU if there is one; of the processes that torchrun starts on a machine, each has the GPU of its number.

    Raises UserError for a device that this machine or PyTorch lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device '{name}' cannot be used here: {str(error).splitlines()[0]} Try device: auto."
        ) from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """While open, the same work on a CPU gives the same bits, with any number of threads, so that resumed equals uninterrupted.

    By default PyTorch's parallel `index_put_` adds in whatever order its threads come along (seen with two threads: the
    gradient of gathering tokens for their experts). The ordered version cost nothing measurable on two cores. On a GPU
    the setting is left alone: there it slows kernels down and some have no ordered version.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
