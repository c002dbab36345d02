"""Grouped products of routed experts, of which some have no token, in memory full of NaN: values and gradients."""

import torch
from section import Section, error_of

from slimqwen.model.internals import grouped_linear

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def poison(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the allocator gives out next."""
    filled = [torch.full(shape, float("nan"), device=device, dtype=dtype) for _ in range(4)]
    del filled


def one_by_one(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Compute the same product expert after expert: the referee."""
    return torch.cat([rows @ weight[expert].T for expert, rows in enumerate(x.split(counts))])


def main() -> None:
    with Section() as section:
        device = section.device
        dtype = torch.bfloat16 if section.on_gpu else torch.float32
        experts, hidden, outputs, rows = (8, 32, 16, 24) if section.quick else (64, 2048, 1024, 4096)
        cases = {
            "every second expert empty": [0 if e % 2 else 2 * rows // experts for e in range(experts)],
            "first and last empty": [0, *[rows // (experts - 2)] * (experts - 2), 0],
            "one expert has all": [0] * (experts - 1) + [rows],
        }
        for name, counts in cases.items():
            with section.part(name) as part:
                generator = torch.Generator(device).manual_seed(0)
                total = sum(counts)
                x = torch.randn(total, hidden, device=device, dtype=dtype, generator=generator).requires_grad_()
                weight = torch.randn(experts, outputs, hidden, device=device, dtype=dtype, generator=generator)
                weight = (weight * hidden**-0.5).requires_grad_()
                upstream = torch.randn(total, outputs, device=device, dtype=dtype, generator=generator)
                offsets = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
                poison((experts, outputs, hidden), device, dtype)
                found = grouped_linear(x, weight, offsets)
                gradients = torch.autograd.grad(found, (x, weight), upstream)

                exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
                expected = one_by_one(exact[0], exact[1], counts)
                expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
                empty = [expert for expert, count in enumerate(counts) if count == 0]
                part.note(experts=experts, empty=len(empty), rows=total)
                part.check_below("value_error", error_of(found, expected), LIMIT[dtype])
                part.check_below("input_gradient_error", error_of(gradients[0], expected_gradients[0]), LIMIT[dtype])
                part.check_below("weight_gradient_error", error_of(gradients[1], expected_gradients[1]), LIMIT[dtype])
                part.check("gradients of empty experts are zero", bool((gradients[1][empty] == 0).all()))


if __name__ == "__main__":
    main()
