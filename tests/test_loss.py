"""The chunked loss against the plain one: full logits, autograd, one line per term."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slimqwen.losses import blocks
from slimqwen.losses.divergence import FORWARD_KL, Distribution, Divergence
from slimqwen.losses.loss import LossSums, LossWeights, align, chunked_loss, count_targets
from slimqwen.losses.signal import LiveSignal
from slimqwen.recipe import LossTerm

pytestmark = pytest.mark.rounding

BATCH, SEQ, HIDDEN, TEACHER_HIDDEN, VOCAB = 3, 5, 4, 6, 11
WEIGHTS = LossWeights(lm=0.3, kd=0.7, mtp_lm=0.11, mtp_kd=0.19)


class Case:
    """Random tokens, student and teacher, with padding on the left, on the right and nowhere; leaves need gradients."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.tokens = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=g)
        self.mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
        self.hidden = random(BATCH, SEQ, HIDDEN).requires_grad_()
        self.mtp_hidden = random(BATCH, SEQ, HIDDEN).requires_grad_()
        self.head = random(VOCAB, HIDDEN).requires_grad_()
        self.teacher_hidden = random(BATCH, SEQ, TEACHER_HIDDEN)
        self.teacher_mtp_hidden = random(BATCH, SEQ, TEACHER_HIDDEN)
        self.teacher_head = random(VOCAB, TEACHER_HIDDEN)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.mtp_hidden, self.head]

    def chunked(
        self,
        weights: LossWeights = WEIGHTS,
        chunk_tokens: int = 3,
        mtp_target: str | None = "main",
        rows: slice = slice(None),
        divergence: Divergence = FORWARD_KL,
    ) -> tuple[Tensor, LossSums]:
        """`mtp_target` None: no teacher. `rows`: a micro-batch."""
        predictions = align(self.tokens[rows], self.hidden[rows], self.mtp_hidden[rows], self.mask[rows])
        teacher = None
        if mtp_target is not None:
            said = align(self.tokens[rows], self.teacher_hidden[rows], self.teacher_mtp_hidden[rows], self.mask[rows])
            own_mtp = said.mtp_hidden if mtp_target == "mtp" else None
            teacher = LiveSignal(said.hidden, self.teacher_head, own_mtp)
        return chunked_loss(
            predictions, self.head, weights, teacher=teacher, divergence=divergence, chunk_tokens=chunk_tokens
        )

    def plain(self, mtp_target: str | None = "main") -> dict[str, Tensor]:
        """Every sum, from the logits of the whole batch: position i predicts i + 1 (main) and i + 2 (MTP)."""
        tokens, real = self.tokens, self.mask
        log_p = (self.hidden @ self.head.T).log_softmax(-1)
        mtp_log_p = (self.mtp_hidden @ self.head.T).log_softmax(-1)
        sums = {
            name: torch.zeros((), dtype=torch.float64) for name in ("lm", "kd", "mtp_lm", "mtp_kd", "top1_agreement")
        }
        log_q = (self.teacher_hidden @ self.teacher_head.T).log_softmax(-1)
        mtp_log_q = (self.teacher_mtp_hidden @ self.teacher_head.T).log_softmax(-1)
        for b in range(BATCH):
            for i in range(SEQ):
                if not (real[b, i] and real[b, i + 1]):
                    continue
                sums["lm"] = sums["lm"] - log_p[b, i, tokens[b, i + 1]]
                sums["kd"] = sums["kd"] + kl(log_q[b, i], log_p[b, i])
                sums["top1_agreement"] = sums["top1_agreement"] + (log_p[b, i].argmax() == log_q[b, i].argmax())
            for i in range(SEQ - 1):
                if not (real[b, i] and real[b, i + 1] and real[b, i + 2]):
                    continue
                sums["mtp_lm"] = sums["mtp_lm"] - mtp_log_p[b, i, tokens[b, i + 2]]
                target = mtp_log_q[b, i] if mtp_target == "mtp" else log_q[b, i + 1]
                sums["mtp_kd"] = sums["mtp_kd"] + kl(target, mtp_log_p[b, i])
        return sums


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True)


def weighted(sums: dict[str, Tensor], weights: LossWeights) -> Tensor:
    return (
        weights.lm * sums["lm"]
        + weights.kd * sums["kd"]
        + weights.mtp_lm * sums["mtp_lm"]
        + weights.mtp_kd * sums["mtp_kd"]
    )


def assert_gradients_equal(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_align_five_tokens_by_hand() -> None:
    tokens = torch.tensor([[10, 11, 12, 13, 14]])
    hidden = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])  # h_i = i
    mtp_hidden = hidden + 100  # m_i = 100 + i predicts t_{i+2}
    found = align(tokens, hidden, mtp_hidden)
    assert found.labels.tolist() == [11, 12, 13, 14]
    assert found.hidden.flatten().tolist() == [0, 1, 2, 3]
    assert found.main_mask.tolist() == [True, True, True, True]
    assert found.mtp_hidden is not None
    assert found.mtp_hidden.flatten()[1:].tolist() == [100, 101, 102]
    assert found.mtp_mask.tolist() == [False, True, True, True]
    assert count_targets(tokens) == (4, 3)


@pytest.mark.parametrize(
    ("mask", "main", "mtp"),
    [
        ([1, 1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]),  # the docstring's: E is padding
        ([0, 1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]),  # B has no context to be predicted from
        ([1, 1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]),
        ([1, 0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_align_padding_by_hand(mask: list[int], main: list[int], mtp: list[int]) -> None:
    tokens, real = torch.zeros(1, 5, dtype=torch.int64), torch.tensor([mask], dtype=torch.bool)
    found = align(tokens, torch.zeros(1, 4, 1), None, real)
    assert found.main_mask.tolist() == [bool(x) for x in main]
    assert found.mtp_mask.tolist() == [bool(x) for x in mtp]
    assert found.mtp_hidden is None
    assert count_targets(tokens, real) == (sum(main), sum(mtp))


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (["lm", "kd", "mtp_lm", "mtp_kd"], (0.25, 0.75, 0.05, 0.15)),
        (["lm", "mtp_lm"], (1.0, 0.0, 0.2, 0.0)),
        (["kd"], (0.0, 1.0, 0.0, 0.0)),
        (["kd", "mtp_kd"], (0.0, 1.0, 0.0, 0.2)),
        (["lm", "kd", "mtp_lm"], (0.25, 0.75, 0.2, 0.0)),
    ],
)
def test_weights_of_terms(terms: list[LossTerm], expected: tuple[float, ...]) -> None:
    found = LossWeights.from_terms(terms, kd_weight=0.75, mtp_weight=0.2)
    assert (found.lm, found.kd, found.mtp_lm, found.mtp_kd) == pytest.approx(expected)
    assert found.per_token(4, 2).mtp_kd == pytest.approx(expected[3] / 2)
    assert found.per_token(4, 2).lm == pytest.approx(expected[0] / 4)


@pytest.mark.parametrize("mtp_target", ["main", "mtp"])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, BATCH * SEQ, 100])
def test_chunked_is_plain(chunk_tokens: int, mtp_target: str) -> None:
    case = Case()
    loss, sums = case.chunked(chunk_tokens=chunk_tokens, mtp_target=mtp_target)
    plain = case.plain(mtp_target)
    expected = weighted(plain, WEIGHTS)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, value in plain.items():
        torch.testing.assert_close(getattr(sums, name), value.detach(), rtol=1e-12, atol=0)
    assert (int(sums.main_tokens), int(sums.mtp_tokens or 0)) == count_targets(case.tokens, case.mask) == (11, 8)
    # An upstream gradient other than 1, as a loss scale or a sum with other losses would give.
    assert_gradients_equal(
        torch.autograd.grad(-2.5 * loss, case.leaves), torch.autograd.grad(-2.5 * expected, case.leaves)
    )


@pytest.mark.parametrize("block_elements", [1, 2 * VOCAB, 3 * VOCAB + 1])
def test_blocks_of_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch, block_elements: int) -> None:
    """Chunks of 5 of the 11 predictions, in blocks of 1, 2 and 3 rows."""
    case = Case()
    expected_loss, expected_sums = case.chunked(chunk_tokens=5)
    expected = torch.autograd.grad(expected_loss, case.leaves)
    monkeypatch.setattr(blocks, "CPU_BLOCK_ELEMENTS", block_elements)
    loss, sums = case.chunked(chunk_tokens=5)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert sums.means() == pytest.approx(expected_sums.means(), rel=1e-12)
    assert_gradients_equal(torch.autograd.grad(loss, case.leaves), expected)


@pytest.mark.parametrize("term", ["lm", "kd", "mtp_lm", "mtp_kd"])
def test_each_term_alone(term: str) -> None:
    case = Case()
    weights = replace(LossWeights(0.0, 0.0, 0.0, 0.0), **{term: 0.4})
    loss, sums = case.chunked(weights)
    plain = case.plain()
    expected = 0.4 * plain[term]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert sums.means() == pytest.approx(
        {name: value.item() / (8 if name.startswith("mtp") else 11) for name, value in plain.items()}
    )
    ours = torch.autograd.grad(loss, case.leaves)
    theirs = torch.autograd.grad(expected, case.leaves, allow_unused=True, materialize_grads=True)
    assert_gradients_equal(ours, theirs)


def test_without_teacher_and_without_mtp() -> None:
    case = Case()
    loss, sums = case.chunked(LossWeights(1.0, 0.0, 0.2, 0.0), mtp_target=None)
    expected = weighted(case.plain(), LossWeights(1.0, 0.0, 0.2, 0.0))
    torch.testing.assert_close(loss, expected)
    assert_gradients_equal(torch.autograd.grad(loss, case.leaves), torch.autograd.grad(expected, case.leaves))
    assert set(sums.means()) == {"lm", "mtp_lm"}

    main_only = align(case.tokens, case.hidden, mask=case.mask)
    loss, sums = chunked_loss(main_only, case.head, LossWeights(1.0, 0.0, 0.2, 0.0), chunk_tokens=4)
    torch.testing.assert_close(loss, case.plain()["lm"])
    assert set(sums.means()) == {"lm"} and sums.mtp_tokens is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_mtp", [False, True])
def test_kd_with_itself_is_exactly_zero(dtype: torch.dtype, own_mtp: bool) -> None:
    case = Case(dtype)
    if not own_mtp:  # an MTP head that says what the main head says one position later
        shifted = case.hidden.detach().roll(-1, dims=1)
        case.mtp_hidden = shifted.requires_grad_()
    case.teacher_hidden, case.teacher_mtp_hidden = case.hidden.detach(), case.mtp_hidden.detach()
    case.teacher_head = case.head.detach()
    loss, sums = case.chunked(LossWeights(0.0, 0.9, 0.0, 0.3), mtp_target="mtp" if own_mtp else "main")
    assert loss.item() == 0.0
    assert sums.kd == sums.mtp_kd == 0.0 and sums.top1_agreement == sums.main_tokens
    for gradient in torch.autograd.grad(loss, case.leaves):
        assert not gradient.any()


def plain_divergence(teacher: Tensor, student: Tensor, divergence: Divergence) -> Tensor:
    """Sum over rows of logits, by the definitions."""
    t = divergence.temperature
    log_p, log_q = (teacher / t).log_softmax(-1), (student / t).log_softmax(-1)
    match divergence.name:
        case "forward_kl":
            return t**2 * kl(log_p, log_q)
        case "reverse_kl":
            return t**2 * kl(log_q, log_p)
        case "jsd":
            beta = divergence.jsd_beta
            log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
            return t**2 * (beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m))


DIVERGENCES = [
    Divergence("forward_kl", temperature=2.0),
    Divergence("reverse_kl"),
    Divergence("reverse_kl", temperature=0.5),
    Divergence("jsd"),
    Divergence("jsd", temperature=1.5, jsd_beta=0.1),
]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_other_divergences_are_autograd_of_their_definition(divergence: Divergence) -> None:
    case = Case()
    loss, sums = case.chunked(divergence=divergence)
    plain = case.plain()
    torch.testing.assert_close(sums.kd, plain["kd"].detach(), rtol=1e-12, atol=0)  # reported whatever is minimised
    torch.testing.assert_close(sums.mtp_kd, plain["mtp_kd"].detach(), rtol=1e-12, atol=0)

    main = case.mask[:, :-1] & case.mask[:, 1:]
    mtp = main[:, :-1] & main[:, 1:]  # m_i learns from the teacher's main distribution one position later
    target = case.teacher_hidden @ case.teacher_head.T
    logits, mtp_logits = case.hidden @ case.head.T, case.mtp_hidden @ case.head.T
    plain["kd"] = plain_divergence(target[main], logits[main], divergence)
    plain["mtp_kd"] = plain_divergence(target[:, 1:][mtp], mtp_logits[:, :-1][mtp], divergence)
    expected = weighted(plain, WEIGHTS)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_gradients_equal(torch.autograd.grad(loss, case.leaves), torch.autograd.grad(expected, case.leaves))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences_of_distributions_without_overlap_are_finite(name: Any) -> None:
    """A probability of e^-300 is 0 in float32, its logarithm is not."""
    teacher, student = torch.tensor([[0.0, -300.0]]), torch.tensor([[-300.0, 0.0]])
    value, gradient = Divergence(name).value_and_gradient(Distribution.of(teacher), Distribution.of(student))
    assert value.item() == pytest.approx(math.log(2.0) if name == "jsd" else 300.0, rel=1e-5)
    assert gradient.isfinite().all()


def test_gradcheck() -> None:
    case = Case()

    def loss(*leaves: Tensor) -> Tensor:
        case.hidden, case.mtp_hidden, case.head = leaves
        return case.chunked()[0]

    assert torch.autograd.gradcheck(loss, tuple(case.leaves))


def test_backward_twice_gives_twice_the_gradient() -> None:
    """The first of the two may not scale or hand out what the second needs."""
    case = Case()
    loss, _ = case.chunked()
    expected = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    expected = tuple(gradient.clone() for gradient in expected)
    loss.backward(retain_graph=True)
    loss.backward(torch.tensor(2.0, dtype=loss.dtype))
    assert_gradients_equal([leaf.grad for leaf in case.leaves], [3.0 * gradient for gradient in expected])


def test_garbage_in_masked_rows_does_not_leak() -> None:
    clean = Case()
    loss, sums = clean.chunked(mtp_target="mtp")
    expected = torch.autograd.grad(loss, clean.leaves)

    case = Case()
    main_counts = (case.mask[:, :-1] & case.mask[:, 1:])[..., None]
    mtp_counts = torch.cat(
        [main_counts[:, :-1] & main_counts[:, 1:], torch.zeros(BATCH, 1, 1, dtype=torch.bool)], dim=1
    )
    with torch.no_grad():
        for tensor, counts in [
            (case.hidden, main_counts),
            (case.mtp_hidden, mtp_counts),
            (case.teacher_hidden, main_counts),
            (case.teacher_mtp_hidden, mtp_counts),
        ]:
            tensor.copy_(torch.where(counts, tensor, torch.nan))
    case.tokens[~case.mask] = -100
    dirty_loss, dirty_sums = case.chunked(mtp_target="mtp")
    assert dirty_loss == loss and dirty_sums == sums
    for ours, theirs in zip(torch.autograd.grad(dirty_loss, case.leaves), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    case = Case()
    case.mask[:] = False
    loss, sums = case.chunked(WEIGHTS.per_token(*count_targets(case.tokens, case.mask)))
    assert loss.item() == 0.0 and sums.means() == {}
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, case.leaves))


@pytest.mark.parametrize("cut", [[3], [1, 1, 1], [1, 2], [2, 1]])
def test_any_cut_into_micro_batches_is_the_same_step(cut: list[int]) -> None:
    """Rows hold 5, 3 and 3 predictions: a loss averaged per micro-batch would fail here."""
    case = Case()
    weights = LossWeights.from_terms(["lm", "kd", "mtp_lm", "mtp_kd"], 0.8, 0.3)
    weights = weights.per_token(*count_targets(case.tokens, case.mask))
    whole, whole_sums = case.chunked(weights)
    expected = torch.autograd.grad(whole, case.leaves)

    parts, start = [], 0
    for rows in cut:
        loss, sums = case.chunked(weights, rows=slice(start, start + rows))
        loss.backward()
        parts.append((loss.detach(), sums))
        start += rows
    total = parts[0][1]
    for _, sums in parts[1:]:
        total += sums
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole.detach(), rtol=1e-12, atol=0)
    assert total.means() == pytest.approx(whole_sums.means(), rel=1e-12)
    assert_gradients_equal([leaf.grad for leaf in case.leaves], expected)


def test_evaluation_does_no_gradient_work() -> None:
    case = Case()
    with torch.no_grad(), MadeTensors() as evaluating:
        loss, sums = case.chunked()
    assert not loss.requires_grad
    torch.testing.assert_close(sums.kd, case.plain()["kd"].detach())
    with MadeTensors() as training:
        case.chunked()
    gradient_of_the_head = (VOCAB, HIDDEN)
    assert gradient_of_the_head in training.shapes and gradient_of_the_head not in evaluating.shapes


def test_only_the_gradients_that_are_asked_for() -> None:
    case = Case()
    frozen = align(case.tokens, case.hidden.detach(), case.mtp_hidden, case.mask)
    loss, _ = chunked_loss(frozen, case.head.detach(), LossWeights(1.0, 0.0, 0.2, 0.0), chunk_tokens=3)
    found = torch.autograd.grad(loss, [case.mtp_hidden])
    expected = torch.autograd.grad(0.2 * case.plain()["mtp_lm"], [case.mtp_hidden])
    assert_gradients_equal(found, expected)


def test_bfloat16_gradients_are_near_float64() -> None:
    """bf16 has 8 bits: a relative error of 1 % of the largest entry is its rounding, not an accumulation of it."""
    case, exact = Case(torch.bfloat16), Case()
    with torch.no_grad():
        for name in ("hidden", "mtp_hidden", "head", "teacher_hidden", "teacher_mtp_hidden", "teacher_head"):
            getattr(exact, name).copy_(getattr(case, name))
    loss, _ = case.chunked(chunk_tokens=1)
    assert loss.dtype == torch.float32
    expected_loss = weighted(exact.plain(), WEIGHTS)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=5e-3, atol=0)
    expected = torch.autograd.grad(expected_loss, exact.leaves)
    for ours, theirs in zip(torch.autograd.grad(loss, case.leaves), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.01 * theirs.abs().max().item())


def test_the_gradient_of_the_head_is_accumulated_in_float32() -> None:
    """1,024 equal contributions: in bfloat16 a sum stops growing at 256 times what is added to it."""
    tokens, hidden = torch.zeros(1, 1025, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    predictions = align(tokens, hidden.expand(1, 1024, 1))
    loss, _ = chunked_loss(predictions, head, LossWeights(1.0, 0.0, 0.0, 0.0), chunk_tokens=1)
    (gradient,) = torch.autograd.grad(loss, [head])
    assert gradient.flatten().tolist() == [-512.0, 512.0]  # softmax is (1/2, 1/2)


def test_autocast_multiplies_in_its_dtype() -> None:
    """Trained in float32 under bfloat16 autocast: the loss of the rounded weights, gradients in float32."""
    case, rounded = Case(torch.float32), Case(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = case.chunked()
    expected, _ = rounded.chunked()
    assert loss.dtype == torch.float32 and loss == expected
    gradients = torch.autograd.grad(loss, case.leaves), torch.autograd.grad(expected, rounded.leaves)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours.bfloat16(), theirs)


def test_a_kd_weight_needs_a_teacher() -> None:
    with pytest.raises(AssertionError, match="needs a teacher"):
        Case().chunked(mtp_target=None)


class MadeTensors(TorchDispatchMode):
    """Records the shape of every tensor that any operation returns, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
        return result


def test_the_logits_of_the_batch_never_exist() -> None:
    tokens_per_row, vocab, hidden_size, chunk_tokens = 64, 50, 2, 16
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab, (4, tokens_per_row + 1), generator=g)
    hidden = torch.randn(4, tokens_per_row, hidden_size, generator=g, requires_grad=True)
    mtp_hidden = torch.randn(4, tokens_per_row, hidden_size, generator=g, requires_grad=True)
    head = torch.randn(vocab, hidden_size, generator=g, requires_grad=True)
    teacher = LiveSignal(torch.randn(4 * tokens_per_row, 2, generator=g), torch.randn(vocab, 2, generator=g))
    with MadeTensors() as made:
        predictions = align(tokens, hidden, mtp_hidden)
        loss, _ = chunked_loss(predictions, head, WEIGHTS, teacher=teacher, chunk_tokens=chunk_tokens)
        loss.backward()
    largest = max(math.prod(shape) for shape in made.shapes)
    assert largest == chunk_tokens * vocab  # = 800; the batch's hidden states are 512, its logits would be 12,800
