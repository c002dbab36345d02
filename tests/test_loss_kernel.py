"""The loss's kernel in Triton's interpreter against float64, what PyTorch compiles of it, and the bytes that a step of the loss moves."""

import importlib.util
import math
import os
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimqwen.losses import blocks, kernel, loss, products
from slimqwen.losses.divergence import FORWARD_KL, Distribution, Divergence
from slimqwen.losses.loss import LossSums, LossWeights, Predictions, chunked_loss
from slimqwen.losses.signal import LiveSignal, StoredSignal, TopTokens
from slimqwen.losses.targets import LiveTargets, StoredTargets, Targets

pytestmark = pytest.mark.rounding

WEIGHTS = LossWeights(lm=0.3, kd=0.7, mtp_lm=0.11, mtp_kd=0.19)
BYTES_PER_TOKEN_AND_ENTRY = 24  # issue 18; 287 before

if importlib.util.find_spec("triton") is not None:
    with patch.dict(
        os.environ, TRITON_INTERPRET="1"
    ):  # before any other test imports it: its own functions are of one kind or the other
        importlib.import_module("triton.language")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="pip install triton (290 MB)")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run kernels on a CPU, in Triton's interpreter, which takes the place of the compiler when they are defined."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "slimqwen.losses.triton_kernels", raising=False)
    monkeypatch.setattr(kernel, "BLOCK", 16)


def expected_rows(logits: Tensor, labels: Tensor, p: Tensor | None, lm: float, kd: float) -> tuple[Tensor, Tensor]:
    """Cross entropy and KL of each row, and the gradient, by autograd in float64; p: the teacher's log-probabilities."""
    logits = logits.double().requires_grad_()
    log_q = logits.log_softmax(1)
    cross_entropy = F.nll_loss(log_q, labels, reduction="none")
    kl = torch.zeros_like(cross_entropy)
    if p is not None:  # entries of the teacher at minus infinity add nothing
        kl = torch.where(p.exp() > 0, p.exp() * (p - log_q), 0).sum(1)
    (lm * cross_entropy + kd * kl).sum().backward()
    assert logits.grad is not None
    return torch.stack([cross_entropy.detach(), kl.detach()], dim=1), logits.grad


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 32, 37])
@pytest.mark.parametrize("kind", ["none", "live", "stored"])
def test_kernel_is_float64(kind: str, vocab: int, dtype: torch.dtype) -> None:
    """In blocks of 16: less than one, exactly two, two and a tail. Row 0 has the student's and the teacher's extremes."""
    g = torch.Generator().manual_seed(vocab)
    logits, other = (3 * torch.randn(5, vocab, generator=g) for _ in range(2))
    if vocab > 1:
        logits[0, 0], other[0, 0], other[0, -1] = 80.0, -1e30, 90.0
    logits, other = logits.to(dtype), other.to(dtype)
    labels = torch.randint(vocab, (5,), generator=g)
    labels[1] = other[1].argmax()  # of a stored teacher one of the top tokens
    targets: Targets | None = None
    p = None
    if kind == "live":
        targets, p = LiveTargets(other), other.double().log_softmax(1)
    elif kind == "stored":
        top = TopTokens.of(Distribution.of(other.double()), min(3, vocab))
        targets = StoredTargets(TopTokens(top.ids, top.log_probs.float(), top.log_tail.float()))
        student = Distribution.of(logits.double())
        p = top.spread_like(student, Distribution(*(torch.empty_like(part) for part in student))).log_probs
    lm, kd = 0.3, 0.0 if kind == "none" else 0.7
    losses, gradient = expected_rows(logits, labels, p, lm, kd)

    found = kernel.run(logits, labels, targets, (lm, kd))
    torch.testing.assert_close(found[:, :2].double(), losses, rtol=2e-5, atol=2e-6)
    assert torch.equal(found[:, 1], found[:, 2])
    rounded = gradient.to(dtype).double()
    torch.testing.assert_close(logits.double(), rounded, rtol=torch.finfo(dtype).eps, atol=1e-6)


@needs_triton
@pytest.mark.usefixtures("interpreted")
def test_kernel_finds_the_same_most_likely_token() -> None:
    """The first of equal ones, in whatever block they are; of a stored teacher the first of its tokens."""
    teacher, student = torch.zeros(3, 40), torch.zeros(3, 40)
    teacher[0, [5, 30]] = 1.0
    student[0, [30]] = 1.0
    teacher[1, 33], student[1, 33] = 2.0, 1.0
    teacher[2, 1], student[2, 2] = 2.0, 1.0
    labels = torch.zeros(3, dtype=torch.int64)
    assert kernel.run(student.clone(), labels, LiveTargets(teacher), ())[:, 3].tolist() == [0.0, 1.0, 0.0]
    top = TopTokens.of(Distribution.of(teacher), 2)
    top.ids[0] = torch.tensor([5, 30])
    assert kernel.run(student.clone(), labels, StoredTargets(top), ())[:, 3].tolist() == [0.0, 1.0, 0.0]


@needs_triton
@pytest.mark.usefixtures("interpreted")
def test_kernel_of_equal_models_is_exactly_zero_and_leaves_logits_without_a_gradient() -> None:
    logits = torch.randn(4, 37, generator=torch.Generator().manual_seed(0))
    student, labels = logits.clone(), torch.zeros(4, dtype=torch.int64)
    assert not kernel.run(student, labels, LiveTargets(logits), ())[:, 1].any() and torch.equal(student, logits)
    kernel.run(student, labels, LiveTargets(logits), (0.0, 0.9))
    assert not student.any()
    assert kernel.run(student[:0], labels[:0], LiveTargets(logits[:0]), (0.5, 0.5)).shape == (0, 4)


class Step:
    """Two heads, ten predictions of which some do not count, and a teacher."""

    def __init__(self, teacher: str, vocab: int = 37) -> None:
        g = torch.Generator().manual_seed(0)
        n, hidden = 10, 8

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        self.leaves = [random(n, hidden), random(n, hidden), random(vocab, hidden)]
        main, mtp = torch.ones(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
        main[[2, 9]] = mtp[[2, 3, 9]] = False
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.leaves[0].data[2] = math.nan
        self.predictions = Predictions(
            torch.randint(vocab, (n,), generator=g), *self.leaves[:1], main, self.leaves[1], mtp
        )
        said, said_mtp, head = random(n, 6), random(n, 6), random(vocab, 6)
        if teacher == "stored":
            self.teacher: Any = StoredSignal(
                *(TopTokens.of(Distribution.of(states @ head.T), 4) for states in (said, said_mtp))
            )
        else:
            self.teacher = LiveSignal(said, head, said_mtp if teacher == "own" else None)

    def run(self, weights: LossWeights = WEIGHTS, **settings: Any) -> tuple[Tensor, LossSums, tuple[Tensor, ...]]:
        found, sums = chunked_loss(
            self.predictions, self.leaves[2], weights, teacher=self.teacher, chunk_tokens=4, **settings
        )
        return found, sums, torch.autograd.grad(found, self.leaves, allow_unused=True, materialize_grads=True)


def assert_alike(found: tuple[Any, LossSums, Any], expected: tuple[Any, LossSums, Any]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].means() == pytest.approx(expected[1].means(), rel=1e-5, abs=1e-6)
    for ours, theirs in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


HALVES = [WEIGHTS, LossWeights(0.3, 0.7, 0.0, 0.0), LossWeights(0.0, 0.0, 0.2, 0.0)]


@pytest.mark.parametrize("divergence", [FORWARD_KL, Divergence("reverse_kl", temperature=2.0)], ids=str)
@pytest.mark.parametrize("weights", HALVES, ids=str)
@pytest.mark.parametrize("teacher", ["main", "own", "stored"])
def test_heads_together_are_heads_one_after_another(
    teacher: str, weights: LossWeights, divergence: Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, in one product of the gradient of the head: both heads, or the one that has a weight."""
    step = Step(teacher)
    expected = step.run(weights, divergence=divergence)
    monkeypatch.setattr(loss, "heads_together", lambda device: True)
    assert_alike(step.run(weights, divergence=divergence), expected)


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("teacher", ["main", "own", "stored"])
def test_the_loss_by_the_kernel_is_the_loss(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(teacher)
    expected = step.run()
    monkeypatch.setattr(loss, "heads_together", lambda device: True)
    monkeypatch.setattr(kernel, "serves", lambda logits, divergence: divergence.is_forward_kl)
    assert_alike(step.run(), expected)
    with torch.no_grad():
        _, sums = chunked_loss(
            step.predictions, step.leaves[2], WEIGHTS, teacher=step.teacher, chunk_tokens=4, divergence=FORWARD_KL
        )
    assert sums.means() == pytest.approx(expected[1].means(), rel=1e-5)


COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from slimqwen.losses import triton_kernels

def compiled(kernel, pointers, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    types = {**{name: "i32" for name in ("vocab", "k")}, **{name: "fp32" for name in ("lm_weight", "kd_weight")}, **pointers}
    signature = {**{name: types[name] for name in names}, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]

out = {"labels_ptr": "*i64", "out_ptr": "*fp32"}
live = {"logits_ptr": "*bf16", "teacher_ptr": "*bf16", **out}
stored = {"logits_ptr": "*bf16", "ids_ptr": "*i64", "log_probs_ptr": "*fp32", "log_tail_ptr": "*fp32", **out}
for text in (
    compiled(triton_kernels.live_rows, live, HAS_TEACHER=True, WANTS_GRADIENT=True, BLOCK=4096),
    compiled(triton_kernels.stored_rows, stored, WANTS_GRADIENT=True, K=64, BLOCK=4096),
):
    assert "bar.sync" in text and "st.global" in text
"""


@needs_triton
def test_kernels_compile_for_a_gpu_without_one(tmp_path: Path) -> None:
    """For compute capability 9.0, in bfloat16: a type that the interpreter takes may be none for the compiler."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", COMPILES], check=True, env=env, timeout=120)


class MovedBytes(TorchDispatchMode):
    """Adds up what operations but matrix products read and write of tensors over [rows, vocab], each once; views move nothing."""

    PRODUCTS = ("mm", "addmm", "addmm_")
    ALLOCATIONS = ("empty", "new_empty", "empty_like")

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.bytes = vocab, 0
        self.learned: list[tuple[Tensor, Tensor | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name == "learn_rows":
            logits, _, teacher = args[:3]  # two reads of each, and one write: counted of the kernel below
            passes = [(logits, 3), (teacher, 2)] if teacher is not None else [(logits, 3)]
            self.bytes += sum(times * tensor.numel() * tensor.element_size() for tensor, times in passes)
        elif not func.is_view and name not in (*self.PRODUCTS, *self.ALLOCATIONS):
            for tensor in tree_leaves((args, kwargs, result)):
                if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.vocab:
                    self.bytes += tensor.numel() * tensor.element_size()
        return result


def moved_bytes(with_kernel: bool) -> float:
    """Bytes per (token, entry) outside the products, of both heads in bfloat16 with a GPU's block size."""
    tokens, vocab, hidden, chunk = 2048, 151_936, 1536, 1024

    def random(*shape: int, needs_grad: bool = False) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16, requires_grad=needs_grad)

    every = torch.ones(tokens, dtype=torch.bool, device="meta")
    labels = torch.zeros(tokens, dtype=torch.int64, device="meta")
    states = [random(tokens, hidden, needs_grad=True) for _ in range(2)]
    predictions = Predictions(labels, states[0], every, states[1], every, targets=tokens)
    teacher = LiveSignal(random(tokens, 2048), random(vocab, 2048))
    with ExitStack() as stack:
        stack.enter_context(patch.object(kernel, "serves", lambda *_: with_kernel))
        stack.enter_context(patch("torch.is_autocast_enabled", lambda device: False))  # which the meta device lacks
        stack.enter_context(patch("torch.autocast", lambda *_, **__: nullcontext()))
        moved = stack.enter_context(MovedBytes(vocab))
        found, _ = chunked_loss(
            predictions,
            random(vocab, hidden, needs_grad=True),
            WEIGHTS,
            teacher=teacher,
            chunk_tokens=chunk,
            unscaled=True,
        )
        found.backward()
    return moved.bytes / tokens / vocab


def test_the_kernel_moves_few_bytes_per_token_and_entry() -> None:
    """Of both heads, and of all that is done between their products; addition to the gradient of the head is in one of these."""
    assert products.accumulates("meta", torch.bfloat16, torch.float32)
    assert moved_bytes(with_kernel=True) <= BYTES_PER_TOKEN_AND_ENTRY
    assert (
        moved_bytes(with_kernel=False) > 4 * BYTES_PER_TOKEN_AND_ENTRY
    )  # the count sees what PyTorch's operations move


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("kind", "passes"), [("live", 5), ("stored", 3)])
def test_the_kernel_reads_and_writes_a_row_as_often_as_counted(kind: str, passes: int) -> None:
    """Entries that the interpreter loads and stores under a mask, beside a few per row."""
    from triton.runtime.interpreter import InterpreterBuilder

    moved = 0

    def counted(name: str) -> Any:
        plain = getattr(InterpreterBuilder, name)

        def call(self: Any, ptrs: Any, *rest: Any) -> Any:
            nonlocal moved
            mask = rest[1] if name == "create_masked_store" else rest[0]
            moved += int(mask.data.sum())
            return plain(self, ptrs, *rest)

        return patch.object(InterpreterBuilder, name, call)

    rows, vocab = 2, 1000
    logits, other = torch.randn(rows, vocab), torch.randn(rows, vocab)
    top = TopTokens.of(Distribution.of(other), 2)
    targets = LiveTargets(other) if kind == "live" else StoredTargets(top)
    with counted("create_masked_load"), counted("create_masked_store"), patch.object(kernel, "BLOCK", 128):
        kernel.run(logits, torch.zeros(rows, dtype=torch.int64), targets, (0.5, 0.5))
    assert passes <= moved / rows / vocab < passes + 0.05


def test_a_missing_triton_is_mentioned_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class OnGpu:
        is_cuda, dtype = True, torch.bfloat16

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel, "has_triton", lambda: False)
    for _ in range(2):
        assert not kernel.serves(OnGpu(), FORWARD_KL)  # type: ignore[arg-type]
    assert capsys.readouterr().err.count("pip install triton") == 1
    assert not kernel.serves(torch.zeros(1, 1), FORWARD_KL)
    monkeypatch.setattr(kernel, "has_triton", lambda: True)
    assert kernel.serves(OnGpu(), FORWARD_KL) and not kernel.serves(OnGpu(), Divergence("jsd"))  # type: ignore[arg-type]


def test_chunks_take_no_more_memory_than_one_head_after_another() -> None:
    """Rows of logits of the student and of a teacher that runs: at most `rows` each."""
    assert blocks.chunk_size(1024, 2, 3) == 640  # of both heads and of the teacher: 1,920 rows of 2,048
    assert blocks.chunk_size(1024, 2, 2) == 1024  # one head, as everywhere on a CPU
    assert blocks.chunk_size(1000, 2, 2) == 1000 and blocks.chunk_size(7, 2, 3) == 4 and blocks.chunk_size(1, 1, 2) == 1
