"""The load-balancing loss: by hand, at balance, and under any cut of the batch."""

import pytest
import torch
from torch import Tensor

from slimqwen.losses.balance import expert_counts, load_balancing_loss
from slimqwen.model.routing import Routing
from slimqwen.parallel.ranks import ALONE, Ranks
from slimqwen.recipe import BalancingCounts
from slimqwen.training.balancing import StepCounts

pytestmark = pytest.mark.rounding


def test_counts_by_hand() -> None:
    indices = torch.tensor([[0, 1], [1, 3], [1, 0], [2, 3]])
    mask = torch.tensor([True, True, True, False])
    counts = expert_counts(indices, mask, num_experts=5)
    assert counts.tolist() == [2, 3, 0, 1, 0]
    assert counts.dtype == torch.int64


def test_the_docstring_example() -> None:
    probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75]])
    mask = torch.ones(3, dtype=torch.bool)
    counts = expert_counts(probs.argmax(1, keepdim=True), mask, 2)
    loss = load_balancing_loss([probs.log()], mask, [counts], global_tokens=3)
    assert loss.item() == pytest.approx(2 * (2 / 3 * 1.75 / 3 + 1 / 3 * 1.25 / 3))
    assert loss.item() == pytest.approx(1.0556, abs=1e-4)


@pytest.mark.parametrize("k", [1, 2])
def test_balance_is_one_and_collapse_is_the_number_of_experts(k: int) -> None:
    mask = torch.ones(8, dtype=torch.bool)
    round_robin = (torch.arange(8)[:, None] + torch.arange(k)) % 4
    logits = 20.0 * torch.nn.functional.one_hot(round_robin, 4).sum(1).float()
    balanced = expert_counts(round_robin, mask, 4)
    assert load_balancing_loss([logits, logits], mask, [balanced, balanced], 8).item() == pytest.approx(1.0)

    all_to_the_first = torch.zeros(8, 4)
    all_to_the_first[:, 0] = 50.0
    counts = expert_counts(torch.zeros(8, 1, dtype=torch.int64), mask, 4)
    assert load_balancing_loss([all_to_the_first], mask, [counts], 8).item() == pytest.approx(4.0)


def test_padding_counts_nowhere() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False, True])
    counts = expert_counts(logits.topk(2).indices, mask, 4)
    kept = load_balancing_loss([logits[mask]], mask[mask], [counts], 4)
    dirty = torch.where(mask[:, None], logits, torch.nan).requires_grad_()
    found = load_balancing_loss([dirty], mask, [counts], 4)
    assert found == kept
    (gradient,) = torch.autograd.grad(found, [dirty])
    assert gradient.isfinite().all() and not gradient[~mask].any()


@pytest.mark.parametrize("cut", [[12], [4, 4, 4], [1, 11], [5, 2, 5]])
def test_any_cut_of_the_batch_has_the_same_loss_and_gradient(cut: list[int]) -> None:
    g = torch.Generator().manual_seed(0)
    blocks = [torch.randn(12, 6, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]
    mask = torch.ones(12, dtype=torch.bool)
    mask[[0, 7]] = False

    whole_counts = [expert_counts(block.topk(2).indices, mask, 6) for block in blocks]
    whole = load_balancing_loss(blocks, mask, whole_counts, global_tokens=10)
    expected = torch.autograd.grad(whole, blocks)

    pieces = list(zip(mask.split(cut), *(block.split(cut) for block in blocks), strict=True))
    summed: list[Tensor] = [torch.zeros(6, dtype=torch.int64) for _ in blocks]
    for part, *logits in pieces:
        summed = [total + expert_counts(x.topk(2).indices, part, 6) for total, x in zip(summed, logits, strict=True)]
    total = sum(load_balancing_loss(logits, part, summed, global_tokens=10) for part, *logits in pieces)
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    for ours, theirs in zip(torch.autograd.grad(total, blocks), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("portion", "cut"), [(2, [6]), (2, [2, 2, 2]), (2, [4, 2]), (2, [3, 3]), (4, [6]), (1, [1, 5]), (9, [3, 3])]
)
def test_rows_meet_the_counts_up_to_the_end_of_their_portion(portion: int, cut: list[int]) -> None:
    """Six rows of four tokens, some of them padding, in any cut: against the definition, row by row."""
    g = torch.Generator().manual_seed(0)
    blocks = [torch.randn(24, 5, generator=g) for _ in range(2)]
    mask = torch.rand(24, generator=g) < 0.8
    routing = [Routing(logits, logits[:, :2], logits.topk(2).indices) for logits in blocks]
    counts = StepCounts(ALONE, BalancingCounts(rows=portion), step_rows=6)
    pieces = []
    for part in torch.arange(24).split([4 * rows for rows in cut]):
        of_part = [Routing(seen.logits[part], seen.gates[part], seen.experts[part]) for seen in routing]
        pieces.append((of_part, mask[part], len(part) // 4))
    assert counts.needs_counting_ahead(cut[0]) == (cut in ([3, 3],))
    if counts.needs_counting_ahead(cut[0]):
        for piece in pieces:
            counts.count_ahead(*piece)
    found = [[x.expand(rows, -1) for x in counts.meet(of_part, part, rows)] for of_part, part, rows in pieces]
    for block, seen in enumerate(routing):
        expected = []
        for row in range(6):
            end = 4 * min((row // portion + 1) * portion, 6)
            expected.append(expert_counts(seen.experts[:end], mask[:end], 5))
        assert torch.equal(torch.cat([piece[block] for piece in found]), torch.stack(expected))


def test_counting_ahead_is_announced() -> None:
    """Of 8 sequences in portions of 4: two at a time, or three, are no multiple of it; four are, and all at once need none."""
    counts = StepCounts(ALONE, BalancingCounts(rows=4), step_rows=8)
    assert "2 of its 8 sequences go through the model at one time, which is no multiple of the 4" in (
        counts.note(2) or ""
    )
    assert counts.note(3) is not None and counts.note(4) is counts.note(8) is None
    assert StepCounts(ALONE, BalancingCounts(kind="exact"), step_rows=8).note(4) is not None
    assert StepCounts(Ranks(rank=1, size=2), BalancingCounts(rows=4), step_rows=8).note(2) is None


def test_rows_with_counts_of_their_own_by_hand() -> None:
    """Two rows of two tokens, two experts. P of the rows: (1, 1) and (0.5, 1.5), over 4 tokens; f: (1/2, 1/2) and (1/4, 3/4)."""
    probs = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.25, 0.75], [0.25, 0.75]])
    counts = torch.tensor([[1, 1], [1, 3]])
    loss = load_balancing_loss([probs.log()], torch.ones(4, dtype=torch.bool), [counts], 4)
    assert loss.item() == pytest.approx(2 * (1 / 2 * 2 / 4 + 1 / 4 * 0.5 / 4 + 3 / 4 * 1.5 / 4))
