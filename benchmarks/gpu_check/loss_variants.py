"""The loss of both heads at the true vocabulary: slimqwen's, plain, compiled and public ones, and its products alone."""

from unittest.mock import patch

import loss as variants
import torch
from loss import Case, Products, gradient_errors
from section import Section, Skip, median_seconds
from torch import Tensor
from torch.nn import functional as F

GRADIENT_LIMIT = {
    "cuda": 5e-2,
    "cpu": 1e-4,
}  # the largest difference of an entry over the largest entry, bfloat16 and float32


def head_loss(hidden: Tensor, head: Tensor, target: Tensor, labels: Tensor, lm: float, kd: float) -> Tensor:
    """Compute one head's loss over full logits."""
    logits = (hidden @ head.T).float()
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    divergence = F.kl_div(F.log_softmax(logits, dim=-1), target, reduction="sum", log_target=True)
    return lm * cross_entropy + kd * divergence


def main() -> None:
    with Section() as section:
        device = section.device
        dtype = torch.bfloat16 if section.on_gpu else torch.float32
        tokens, vocab, chunk = (32, 512, 16) if section.quick else (4096, variants.VOCAB, 1024)
        rounds = 2 if section.quick else 5
        case = Case(tokens, vocab, device, dtype, chunk)
        products = 0.0

        def measure(part, run) -> None:  # type: ignore[no-untyped-def]
            took = median_seconds(lambda: variants.seconds(run, case), device, rounds=rounds, warmups=1)
            part.note(milliseconds=1e3 * took, over_products=took / products if products else 1.0)
            if section.on_gpu:
                part.note(peak_gb=variants.peak_extra_bytes(run, case) / 1e9)

        with section.part("products alone") as part:
            bare = Products(case)
            measure(part, bare)
            products = part.numbers["milliseconds"] / 1e3
            del bare
        with section.part("slimqwen") as part:
            part.check_below("largest_gradient_error", max(gradient_errors(case)), GRADIENT_LIMIT[device])
            measure(part, variants.ours)
        with section.part("slimqwen without its kernel") as part:
            if not section.on_gpu:
                raise Skip("the kernel is for GPUs")
            with patch("slimqwen.losses.kernel.serves", lambda *_: False):
                part.check_below("largest_gradient_error", max(gradient_errors(case)), GRADIENT_LIMIT[device])
                measure(part, variants.ours)
        with section.part("plain") as part:
            measure(part, variants.plain)
        with section.part("compiled") as part:
            if not section.on_gpu:
                raise Skip("compiling for a CPU takes longer than all other parts")
            compiled = torch.compile(head_loss)

            def run_compiled(case: Case) -> None:
                target = F.log_softmax((case.teacher_hidden @ case.teacher_head.T).float(), dim=-1)
                heads = [compiled(h, case.head, target, case.labels, lm, kd) for h, lm, kd in case.heads]
                torch.stack(heads).sum().backward()

            measure(part, run_compiled)
        with section.part("Liger" if section.on_gpu else "torchtune's algorithm") as part:
            try:
                measure(part, variants.public_on_gpu if section.on_gpu else variants.public_on_cpu)
            except ImportError as error:
                raise Skip(f"liger-kernel cannot be imported: {error}") from error


if __name__ == "__main__":
    main()
