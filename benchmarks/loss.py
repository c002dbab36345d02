"""The distillation loss compared with plain PyTorch, a public chunked or fused loss, and its matrix products alone.

    python benchmarks/loss.py [--json] [--tokens N] [--rounds N]
    python benchmarks/loss.py --memory-only [--json] [--tokens N]

Forward and backward of LM + KD on the main and the MTP head, at Qwen3-Next's vocabulary and hidden size and the 23A2B
student's: float32 on a CPU, bfloat16 on a GPU. Variants alternate in one process; every ratio is the median of the
rounds' ratios. On a CPU set OMP_NUM_THREADS to the number of free cores: load by other processes slows the many small
parallel steps more than the few large products. Needs about 13 GB at 2,048 tokens, 8 GB at 1,024.

With --memory-only nothing is computed or allocated: the same code runs on tensors without data (PyTorch's meta device), in
bfloat16 and with a GPU's block size, and the peak of the bytes alive is counted.

    memory_over_plain   peak memory beyond the inputs, gradients included, over that of plain PyTorch
    time_over_plain     over full logits, log_softmax, F.cross_entropy, F.kl_div and autograd
    time_over_public    over torchtune's algorithm on a CPU (tokens in 8 chunks, cross entropy and forward KL of each under
                        autograd, no compilation), over Liger-Kernel's fused linear CE and fused linear JSD on a GPU
    time_over_matmuls   over the products alone, in the same chunks: the teacher's logits once; logits and two gradients
                        of the student's main and MTP head
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from slimqwen.losses.loss import LossWeights, Predictions, chunked_loss
from slimqwen.losses.signal import LiveSignal
from slimqwen.model.live_bytes import LiveStorages

VOCAB, TEACHER_HIDDEN, STUDENT_HIDDEN = 151_936, 2048, 1536
WEIGHTS = LossWeights(lm=0.25, kd=0.75, mtp_lm=0.05, mtp_kd=0.15)
PUBLIC_CHUNKS = 8  # torchtune's default


class Case:
    """Random hidden states and heads whose logits have a standard deviation of 2; the student's are leaves."""

    def __init__(self, tokens: int, vocab: int, device: str, dtype: torch.dtype, chunk_tokens: int) -> None:
        def random(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        torch.manual_seed(0)
        self.tokens, self.chunk_tokens = tokens, chunk_tokens
        self.labels = torch.randint(vocab, (tokens,), device=device)
        self.hidden = random(tokens, STUDENT_HIDDEN, scale=1.0).requires_grad_()
        self.mtp_hidden = random(tokens, STUDENT_HIDDEN, scale=1.0).requires_grad_()
        self.head = random(vocab, STUDENT_HIDDEN, scale=2.0 * STUDENT_HIDDEN**-0.5).requires_grad_()
        self.teacher_hidden = random(tokens, TEACHER_HIDDEN, scale=1.0)
        self.teacher_head = random(vocab, TEACHER_HIDDEN, scale=2.0 * TEACHER_HIDDEN**-0.5)
        self.leaves = (self.hidden, self.mtp_hidden, self.head)
        weights = WEIGHTS.per_token(tokens, tokens)
        self.heads = ((self.hidden, weights.lm, weights.kd), (self.mtp_hidden, weights.mtp_lm, weights.mtp_kd))


def ours(case: Case) -> None:
    """Run slimqwen's loss."""
    every = torch.ones_like(case.labels, dtype=torch.bool)
    predictions = Predictions(case.labels, case.hidden, every, case.mtp_hidden, every)
    loss, _ = chunked_loss(
        predictions,
        case.head,
        WEIGHTS.per_token(case.tokens, case.tokens),
        teacher=LiveSignal(case.teacher_hidden, case.teacher_head),
        chunk_tokens=case.chunk_tokens,
        unscaled=True,
    )
    loss.backward()


def plain(case: Case) -> None:
    """Run the loss over full logits with autograd."""
    target = F.log_softmax((case.teacher_hidden @ case.teacher_head.T).float(), dim=-1)
    loss = torch.zeros((), device=target.device)
    for hidden, lm_weight, kd_weight in case.heads:
        logits = (hidden @ case.head.T).float()
        lm = F.cross_entropy(logits, case.labels, reduction="sum")
        kd = F.kl_div(F.log_softmax(logits, dim=-1), target, reduction="sum", log_target=True)
        loss = loss + lm_weight * lm + kd_weight * kd
    loss.backward()


def public_on_cpu(case: Case) -> None:
    """Run the algorithm of torchtune.modules.loss (LinearCrossEntropyLoss, ForwardKLWithChunkedOutputLoss)."""
    loss = torch.zeros(())
    for rows in torch.arange(case.tokens).tensor_split(PUBLIC_CHUNKS):
        teacher_probs = F.softmax(case.teacher_hidden[rows] @ case.teacher_head.T, dim=-1)
        for hidden, lm_weight, kd_weight in case.heads:
            logits = hidden[rows] @ case.head.T
            lm = F.cross_entropy(logits, case.labels[rows], reduction="sum")
            kd = -(teacher_probs * F.log_softmax(logits, dim=-1)).sum()
            loss = loss + lm_weight * lm + kd_weight * kd
    loss.backward()


def public_on_gpu(case: Case) -> None:
    """Run Liger-Kernel's fused linear losses."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    cross_entropy, forward_kl = LigerFusedLinearCrossEntropyLoss(reduction="sum"), LigerFusedLinearJSD(jsd_beta=0.0)
    loss = torch.zeros((), device=case.labels.device)
    for hidden, lm_weight, kd_weight in case.heads:
        lm = cross_entropy(case.head, hidden, case.labels)
        kd = case.tokens * forward_kl(hidden, case.head, case.teacher_hidden, case.teacher_head)  # a mean
        loss = loss + lm_weight * lm + kd_weight * kd
    loss.backward()


class Products:
    """Matrix products of the loss, with the same outputs, and nothing between them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.teacher_logits = case.teacher_head.new_empty(case.chunk_tokens, case.teacher_head.shape[0])
        self.logits = case.head.new_empty(case.chunk_tokens, case.head.shape[0])
        self.grad_hidden = torch.empty_like(case.hidden)
        self.grad_head = torch.zeros_like(case.head)

    @torch.no_grad()
    def __call__(self, case: Case) -> None:
        for start in range(0, case.tokens, case.chunk_tokens):
            rows = slice(start, min(start + case.chunk_tokens, case.tokens))
            size = rows.stop - rows.start
            torch.mm(case.teacher_hidden[rows], case.teacher_head.T, out=self.teacher_logits[:size])
            for hidden, _, _ in case.heads:
                logits = torch.mm(hidden[rows], case.head.T, out=self.logits[:size])
                torch.mm(logits, case.head, out=self.grad_hidden[rows])
                self.grad_head.addmm_(logits.T, hidden[rows])


def seconds(run: Callable[[Case], None], case: Case) -> float:
    """Time `run`."""
    for leaf in case.leaves:
        leaf.grad = None
    _wait(case)
    started = time.perf_counter()
    run(case)
    _wait(case)
    return time.perf_counter() - started


def _wait(case: Case) -> None:
    """Wait for the GPU."""
    if case.labels.is_cuda:
        torch.cuda.synchronize()


def peak_extra_bytes(run: Callable[[Case], None], case: Case) -> int:
    """Return the peak memory during `run` beyond the memory in use before it."""
    for leaf in case.leaves:
        leaf.grad = None
    if case.labels.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(case)
        return torch.cuda.max_memory_allocated() - before
    with _sampled_memory() as samples:
        run(case)
    return max(samples) - samples[0]


@contextmanager
def _sampled_memory() -> Iterator[list[int]]:
    """Sample this process's anonymous resident memory every 2 ms, in bytes."""
    samples, done = [_anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(_anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def _anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def counted_extra_bytes(
    run: Callable[[Case], None], tokens: int, vocab: int, chunk_tokens: int, with_kernel: bool
) -> int:
    """Return what `peak_extra_bytes` of `run` would be on a GPU, without one."""
    case = Case(tokens, vocab, "meta", torch.bfloat16, chunk_tokens)
    with ExitStack() as stack:
        stack.enter_context(patch("slimqwen.losses.kernel.serves", lambda *_: with_kernel))
        stack.enter_context(patch("torch.fx.experimental._config.meta_nonzero_assume_all_nonzero", True))
        stack.enter_context(patch("torch.is_autocast_enabled", lambda device: False))  # which the meta device lacks
        stack.enter_context(patch("torch.autocast", lambda *_, **__: nullcontext()))
        shapes = stack.enter_context(LiveStorages())
        run(case)
    return shapes.most


def gradient_errors(case: Case) -> list[float]:
    """Compare our gradients with plain PyTorch's: per leaf, the largest difference of an entry over the largest entry."""
    seconds(plain, case)
    expected = [leaf.grad for leaf in case.leaves]
    seconds(ours, case)
    pairs = [(leaf.grad, other) for leaf, other in zip(case.leaves, expected, strict=True)]
    return [float((found - other).abs().max() / other.abs().max()) for found, other in pairs]


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="End with one line of JSON.")
    parser.add_argument("--tokens", type=int, help="Default: 4,096; on a CPU 2,048.")
    parser.add_argument("--chunk-tokens", type=int, help="Of ours and the products. Default: 1,024; on a CPU 256.")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--rounds", type=int, default=20 if on_gpu else 3)
    parser.add_argument(
        "--memory-only", action="store_true", help="Count the bytes of tensors on a GPU without computing."
    )
    options = parser.parse_args()

    if options.memory_only:
        tokens, chunk_tokens = options.tokens or 4096, options.chunk_tokens or 1024
        runs: dict[str, tuple[Callable[[Case], None], bool]] = {
            "ours": (ours, True),
            "without Triton": (ours, False),
            "plain": (plain, False),
        }
        bytes_of = {
            name: counted_extra_bytes(run, tokens, options.vocab, chunk_tokens, with_kernel)
            for name, (run, with_kernel) in runs.items()
        }
        print(", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in bytes_of.items()))
        result = {"memory_over_plain": bytes_of["ours"] / bytes_of["plain"]}
        print(json.dumps(result) if options.json else f"memory_over_plain  {result['memory_over_plain']:.3f}")
        return
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    tokens = options.tokens or (4096 if on_gpu else 2048)
    chunk_tokens = options.chunk_tokens or (1024 if on_gpu else 256)
    case = Case(tokens, options.vocab, device, dtype, chunk_tokens)
    others = {"plain": plain, "public": public_on_gpu if on_gpu else public_on_cpu, "matmuls": Products(case)}
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, {dtype}, {tokens:,} tokens in chunks of {chunk_tokens:,}, vocabulary {options.vocab:,}")
    errors = ", ".join(f"{error:.1e}" for error in gradient_errors(case))
    print(f"largest error of the gradients of hidden, mtp_hidden and head against plain: {errors}", flush=True)

    for run in others.values():
        seconds(run, case)  # warm up; plain and ours have run
    variants = {"ours": ours, **others}
    rounds = []
    for number in range(options.rounds):
        rounds.append({name: seconds(run, case) for name, run in variants.items()})
        took = ", ".join(f"{name} {value:.3f} s" for name, value in rounds[-1].items())
        print(f"round {number + 1}: {took}", flush=True)
    memory = {name: peak_extra_bytes(run, case) for name, run in variants.items() if name != "matmuls"}
    for name in ("ours", *others):
        times = sorted(took[name] for took in rounds)
        used = f"{memory[name] / 1e9:8.2f} GB" if name in memory else ""
        print(f"{name:8} {statistics.median(times):9.3f} s  ({times[0]:.3f} to {times[-1]:.3f}) {used}")

    result = {"memory_over_plain": memory["ours"] / memory["plain"]}
    for name in others:
        result[f"time_over_{name}"] = statistics.median(took["ours"] / took[name] for took in rounds)
    for key, value in result.items():
        print(f"{key:18} {value:.3f}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
