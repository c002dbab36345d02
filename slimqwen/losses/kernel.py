"""The loss of a chunk in one kernel per head, on GPUs where Triton can be imported; elsewhere targets.py works block by block."""

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from slimqwen.core.warning import warn_once
from slimqwen.losses.divergence import Divergence
from slimqwen.losses.targets import LiveTargets, StoredTargets, Targets

BLOCK = 4096  # entries of a row at one time
WARPS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(logits: Tensor, divergence: Divergence) -> bool:
    """Return whether `run` computes the loss of these logits; print a line where only Triton is missing."""
    if not (logits.is_cuda and logits.dtype in DTYPES and divergence.is_forward_kl):
        return False
    if not has_triton() and torch.cuda.is_available():  # it is not where a step is traced on tensors without data
        warn_once("SLOW: the loss runs on PyTorch's operations; faster with: pip install triton")
    return has_triton()


@cache
def has_triton() -> bool:
    """Return whether Triton is installed, as it is with PyTorch's builds for CUDA."""
    return importlib.util.find_spec("triton") is not None


def run(logits: Tensor, labels: Tensor, targets: Targets | None, weights: Sequence[float]) -> Tensor:
    """Compute the losses of a head's rows, [rows, 4] float32, each as `Heads.losses_of_block` describes.

    Args:
        logits: [rows, vocab], the student's; they become their own gradient if wanted, and may be overwritten anyway.
        labels: [rows] int64.
        targets: the teacher's, of the same rows; None without one.
        weights: of cross entropy and KL in the gradient; empty where no gradient is wanted.
    """
    if isinstance(targets, StoredTargets):
        return learn_rows(logits, labels, None, *targets.top, weights)
    assert targets is None or isinstance(targets, LiveTargets)
    return learn_rows(logits, labels, None if targets is None else targets.logits, None, None, None, weights)


# An operator of PyTorch's, so that a step can be traced on tensors without data.
@torch.library.custom_op("slimqwen::learn_rows", mutates_args=("logits",))
def learn_rows(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    ids: Tensor | None,
    log_probs: Tensor | None,
    log_tail: Tensor | None,
    weights: Sequence[float],
) -> Tensor:
    """Start the kernel of `run`; teacher: [rows, vocab]; or ids, log_probs, log_tail: of `TopTokens`."""
    from slimqwen.losses import triton_kernels

    rows, vocab = logits.shape
    found = torch.zeros(rows, 4, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return found
    assert logits.is_contiguous() and (teacher is None or teacher.is_contiguous())
    lm_weight, kd_weight = weights or (0.0, 0.0)
    block = min(BLOCK, _power_of_two(vocab))
    with torch.cuda.device_of(logits):
        if ids is not None and log_probs is not None and log_tail is not None:
            k = ids.shape[1]
            stored = (ids.contiguous(), log_probs.contiguous(), log_tail.contiguous())
            sizes = {"K": _power_of_two(k), "BLOCK": block, "num_warps": WARPS}
            triton_kernels.stored_rows[(rows,)](
                logits, *stored, labels, found, vocab, k, lm_weight, kd_weight, bool(weights), **sizes
            )
        else:
            other = logits if teacher is None else teacher
            has_teacher, wants_gradient = teacher is not None, bool(weights)
            flags = {"HAS_TEACHER": has_teacher, "WANTS_GRADIENT": wants_gradient, "BLOCK": block, "num_warps": WARPS}
            triton_kernels.live_rows[(rows,)](logits, other, labels, found, vocab, lm_weight, kd_weight, **flags)
    return found


@learn_rows.register_fake
def _(logits: Tensor, *rest: object) -> Tensor:
    return torch.empty(logits.shape[0], 4, dtype=torch.float32, device=logits.device)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()
