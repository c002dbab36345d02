"""Matrix products whose sums are kept in more digits than their factors."""

from functools import cache

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total` [n, m], in the product itself where `total` has the dtype of both or the device can (bfloat16 to float32)."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif accumulates(a.device.type, a.dtype, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


@cache
def accumulates(device: str, factors: torch.dtype, total: torch.dtype) -> bool:
    """Return whether a product of `factors` can be added to `total` without being rounded to their dtype: by trying one.

    cuBLAS can; PyTorch has it as an overload of addmm for CUDA, and for no CPU (2.13). Not run on a GPU.
    """
    if device == "cpu":
        return False
    ones = torch.ones(16, 16, dtype=factors, device=device)
    sums = torch.zeros(16, 16, dtype=total, device=device)
    try:
        torch.addmm(sums, ones, ones, out_dtype=total, out=sums)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True
