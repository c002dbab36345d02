"""DeltaNet's kernels: flash-linear-attention against Transformers' reference, forward and backward, at the true widths."""

import importlib
from collections.abc import Callable

import torch
from section import Section, Skip, error_of, median_seconds
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

LIMIT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # a wrong gradient is off by its own size


def inputs(tokens: int, heads: int, dim: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Draw query, key, value [1, tokens, heads, dim], and decay and beta [1, tokens, heads], all leaves."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    wide = [random(1, tokens, heads, dim).to(dtype) for _ in range(3)]
    decay = F.logsigmoid(random(1, tokens, heads) + 3.0)  # float32, as the model has it
    beta = random(1, tokens, heads).sigmoid().to(dtype)
    return [tensor.requires_grad_() for tensor in (*wide, decay, beta)]


def run(rule: Callable[..., tuple[Tensor, Tensor | None]], given: list[Tensor]) -> tuple[Tensor, ...]:
    """Return output and gradients."""
    query, key, value, decay, beta = given
    output, _ = rule(query, key, value, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)
    upstream = torch.linspace(-1.0, 1.0, output.numel(), device=output.device).view_as(output).to(output.dtype)
    return output, *torch.autograd.grad(output, given, upstream)


def main() -> None:
    with Section() as section:
        device = section.device
        tokens, heads, dim = (96, 2, 16) if section.quick else (2048, 32, 128)
        names = ("value", "query gradient", "key gradient", "value gradient", "decay gradient", "beta gradient")
        with section.part("reference: chunks over recurrence") as part:
            few = inputs(min(tokens, 192), heads, dim, device, torch.float32)
            expected = run(torch_recurrent_gated_delta_rule, few)
            for name, found, other in zip(names, run(torch_chunk_gated_delta_rule, few), expected, strict=True):
                part.check_below(f"{name} error", error_of(found, other), LIMIT[torch.float32])
        with section.part("flash-linear-attention") as part:
            if not section.on_gpu:
                raise Skip("its kernels are for a GPU")
            try:
                rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
            except ImportError as error:
                raise Skip(f"flash-linear-attention cannot be imported: {error}") from error
            given = inputs(tokens, heads, dim, device, torch.bfloat16)
            exact = [tensor.detach().float().requires_grad_() for tensor in given]
            expected = run(torch_chunk_gated_delta_rule, exact)
            for name, found, other in zip(names, run(rule, given), expected, strict=True):
                part.check_below(f"{name} error", error_of(found, other), LIMIT[torch.bfloat16])
            took = median_seconds(lambda: run(rule, given), device, rounds=5)
            reference = median_seconds(lambda: run(torch_chunk_gated_delta_rule, given), device, rounds=2, warmups=1)
            part.note(milliseconds=1e3 * took, reference_over_fla=reference / took)


if __name__ == "__main__":
    main()
