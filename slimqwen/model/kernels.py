"""Which code computes a model's parts on a device: what is used, which of it is a slow fallback, what would be faster."""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from slimqwen.core.errors import UserError
from slimqwen.core.progress import say
from slimqwen.core.versions import in_words, release
from slimqwen.core.warning import warn
from slimqwen.families import Config, Family
from slimqwen.model.frozen import frozen_experts_forward

BATCHED_EXPERTS = "slimqwen_batched"
FLASH_CAPABILITY = (8, 0)  # of a GPU, from which PyTorch has flash attention and the grouped product
GROUPED_ROW_BYTES = 16  # a row of each operand of the grouped product is a multiple of them
FLASH_HEAD_DIM = 256  # the largest that PyTorch's flash attention takes
FLA = "flash-linear-attention"
HOPPER, BLACKWELL = 9, 10  # compute capabilities begin with them; later ones are taken for Blackwell
# Triton's releases, from and below, by whose code on Hopper the gated delta rule's gradients are wrong (issues 640 and 983 of
# flash-linear-attention). Release 0.6 of that refuses them, older ones compute with them. PyTorch 2.12.1 brings Triton 3.7.1.
WRONG_ON_HOPPER = (3, 4), (3, 7, 1)


@dataclass(frozen=True)
class Kernel:
    """What computes one part of a model. `remedy`: how to get something faster; None: this is the fast one."""

    part: str
    used: str
    remedy: str | None = None


def kernels_of(family: Family, config: Config, device: torch.device) -> list[Kernel]:
    """Return what a model of this config uses on this device, part by part.

    On a CPU nothing is missing: the packages with faster kernels are for GPUs. Not run on a GPU yet.
    """
    blocks = family.blocks(config)
    mixers = {part for block in blocks for part in block.tables if part in ("attention", "deltanet")}
    has_experts = any(block.experts is not None for block in blocks)
    if device.type != "cuda":
        used = {"attention": "PyTorch's", "deltanet": "Transformers' reference code"}
        experts = [Kernel("routed experts", "grouped products")] if has_experts else []
        return [Kernel(part, used[part]) for part in sorted(mixers)] + experts

    modern = torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    kernels = []
    if "attention" in mixers:
        kernels.append(_attention(config["head_dim"], modern))
    if "deltanet" in mixers:
        kernels += [
            _package("DeltaNet", "fla.ops.gated_delta_rule", FLA),
            _package("DeltaNet's convolution", "causal_conv1d", "causal-conv1d"),
        ]
    if has_experts and modern:
        kernels.append(Kernel("routed experts", "grouped products"))
    elif has_experts:
        kernels.append(
            Kernel("routed experts", "one expert after another", "a GPU of compute capability 8.0 or higher")
        )
    return kernels


def _attention(head_dim: int, modern: bool) -> Kernel:
    if not modern:
        return Kernel("attention", "PyTorch's without flash attention", "a GPU of compute capability 8.0 or higher")
    if head_dim > FLASH_HEAD_DIM:
        return Kernel("attention", f"PyTorch's without flash attention (head_dim {head_dim})", "a smaller head_dim")
    return Kernel("attention", "PyTorch's flash attention")


def _package(part: str, module: str, package: str) -> Kernel:
    """Return the kernel of a package, which Transformers takes at its own import where it can be imported."""
    try:
        importlib.import_module(module)
    except Exception:  # a package built for another PyTorch fails in any way it likes
        return Kernel(part, "Transformers' reference code", f"pip install {package}")
    return Kernel(part, package)


def announce_slow(family: Family, config: Config, device: torch.device) -> None:
    """Say one line for each part that runs on a slow fallback; nothing where all is well."""
    for kernel in kernels_of(family, config, device):
        if kernel.remedy is not None:
            warn(f"SLOW: {kernel.part} runs on {kernel.used}; faster with: {kernel.remedy}")


def check_gradients(family: Family, config: Config, device: torch.device) -> None:
    """Check, before a model of this config trains on this device, that its kernels compute right gradients.

    Raises UserError for a combination of releases that does not. From reports and the packages' sources: not run on a GPU yet.
    """
    if device.type != "cuda":
        return
    capability, _ = torch.cuda.get_device_capability(device)
    used = {kernel.used for kernel in kernels_of(family, config, device)}
    first, fixed = WRONG_ON_HOPPER
    triton, fla = release("triton"), release("fla-core") or release(FLA)
    by_tilelang = fla >= (0, 6) and bool(release("tilelang"))  # which computes in Triton's place
    if FLA in used and capability == HOPPER and first <= triton < fixed and not by_tilelang:
        raise UserError(
            f"Triton {in_words(triton)} computes wrong gradients of DeltaNet on this GPU with {FLA} {in_words(fla)}: install PyTorch "
            f"2.12.1 or newer, which brings Triton {in_words(fixed)}, or train without {FLA} (pip uninstall {FLA} fla-core), slowly."
        )


def announce_zeroed_gradients(family: Family, config: Config, device: torch.device) -> None:
    """Print a line where gradients that PyTorch leaves unset are set to zero (`leaves_gradients_unset`)."""
    if leaves_gradients_unset(device) and any(block.experts is not None for block in family.blocks(config)):
        say(
            "PyTorch's grouped product does not set the gradients of experts without a token on this GPU (pytorch issue 172439): "
            "they are set to zero here"
        )


def leaves_gradients_unset(device: torch.device) -> bool:
    """Return whether the grouped product leaves the gradients of experts without a token as the memory was."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= BLACKWELL


def batched_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute all routed experts in two grouped products, in autocast's dtype where that is on.

    Autocast does not know the grouped product. Left to itself, float32 weights would be multiplied in float32, for
    which a GPU has no grouped kernel: PyTorch then runs one expert after another and waits for the GPU in between.
    On a CPU frozen experts in another dtype than the hidden states are computed one after another (`model/frozen.py`).

    Shapes: hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k]; returns [tokens, hidden].
    Raises UserError for experts of a size that the grouped product does not take.
    """
    device = hidden_states.device
    weights: Any = self.gate_up_proj  # not `get_parameter`: healing puts a tensor in the parameter's place
    is_autocast = torch.is_autocast_enabled(device.type)
    if device.type == "cpu" and not is_autocast and not weights.requires_grad and weights.dtype != hidden_states.dtype:
        return frozen_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    dtype = torch.get_autocast_dtype(device.type) if is_autocast else weights.dtype
    check_rows(self, dtype)
    experts: Any = self if dtype == weights.dtype else _CastExperts(self, dtype)
    if torch.is_grad_enabled() and leaves_gradients_unset(device):
        experts = _ExpertsInUse(experts, top_k_index)
    return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)


def check_rows(experts: Any, dtype: torch.dtype) -> None:
    """Raise UserError where PyTorch's grouped product in `dtype` does not take routed experts of this size.

    Its own error names neither the size nor a remedy.
    """
    check_expert_sizes(experts.gate_up_proj.shape[-1], experts.down_proj.shape[-1], dtype)


def check_expert_sizes(hidden: int, intermediate: int, dtype: torch.dtype, where: str = "here") -> None:
    """Check the rows (`check_rows`) of experts that are not there yet. `where`: where they will be."""
    units = GROUPED_ROW_BYTES // dtype.itemsize
    for name, size in (("hidden", hidden), ("intermediate", intermediate)):
        if size % units:
            raise UserError(
                f"PyTorch's grouped product of {dtype} takes experts whose {name} size is a multiple of {units}, and it is "
                f"{size} {where}: choose one that is, of 8 for every dtype."
            )


class _CastExperts:
    """An experts module as Transformers' function reads it, its weights cast: their gradient keeps the weights' dtype.

    Weights need not be parameters: ranks that share experts lend the module plain tensors (`expert_parallel`).
    """

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self.experts = experts
        self.dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.experts, name)
        return value.to(self.dtype) if isinstance(value, Tensor) else value


class _ExpertsInUse:
    """An experts module as Transformers' function reads it, whose weights' gradients are zero for experts without a token."""

    def __init__(self, experts: Any, top_k_index: Tensor) -> None:
        self.experts = experts
        used = torch.zeros(experts.num_experts, dtype=torch.bool, device=top_k_index.device)
        self.used = used.index_fill_(0, top_k_index.flatten(), True)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.experts, name)
        if not (isinstance(value, Tensor) and value.requires_grad):
            return value
        value = value.view_as(value)  # the hook is of this use, and not of the parameter
        used = self.used.view(-1, *[1] * (value.ndim - 1))
        value.register_hook(lambda gradient: torch.where(used, gradient, 0.0))
        return value


ALL_EXPERTS_FUNCTIONS.register(BATCHED_EXPERTS, batched_experts_forward)
