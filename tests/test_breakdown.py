"""Losses by position and frequency, and the calibration error, against numbers worked out by hand."""

from math import log
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slimqwen.data.packed import PackedWriter
from slimqwen.evaluation.breakdown import breakdown, token_ranks
from slimqwen.evaluation.fidelity import Recording
from slimqwen.losses.loss import Predictions

pytestmark = pytest.mark.rounding

HALF, ALL = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([1.0, 1e-30, 1e-30]).log()


def recording(rows: list[Tensor], labels: list[int], mask: list[bool] | None = None) -> Recording:
    """Predictions whose logits are the given rows: the hidden states themselves, with the identity as the head."""
    hidden, n = torch.stack(rows), len(labels)
    real = torch.tensor([True] * n if mask is None else mask)
    predictions = Predictions(torch.tensor(labels), hidden, real, None, torch.zeros(n, dtype=torch.bool))
    return Recording([predictions], torch.eye(3), {})


def test_losses_by_position_and_rank() -> None:
    # Two sequences of four predictions; token 0 is the most frequent, 1 the second, 2 does not occur.
    labels = [0, 1, 2, 0, 0, 0, 1, 1]
    found = breakdown(recording([HALF] * 8, labels), 4, torch.tensor([1, 2, 0]))
    half, quarter = log(2), log(4)
    assert found.loss_by_position == pytest.approx(
        {"1": half, "2-3": (quarter + quarter + half + quarter) / 4, "4-7": (half + quarter) / 2}
    )
    assert found.loss_by_frequency == pytest.approx({"unseen": quarter, "1": half, "2-10": quarter})


def test_calibration_error_is_the_gap_between_confidence_and_truth() -> None:
    # Four predictions at 50 %, all right: a gap of 0.5. Four at 100 %, of which one is right: a gap of 0.75.
    labels = [0, 0, 0, 0, 0, 1, 2, 1]
    found = breakdown(recording([HALF] * 4 + [ALL] * 4, labels), 8, torch.tensor([1, 2, 3]))
    assert found.calibration_error == pytest.approx((0.5 + 0.75) / 2)


def test_padding_does_not_count() -> None:
    broken = torch.full((3,), torch.nan)
    found = breakdown(recording([HALF, HALF, broken], [0, 0, 0], [True, True, False]), 3, torch.tensor([1, 2, 3]))
    assert found.loss_by_position == pytest.approx({"1": log(2), "2-3": log(2)})
    assert found.calibration_error == pytest.approx(0.5)


def test_ranks_count_the_text(tmp_path: Path) -> None:
    with PackedWriter(tmp_path / "train", 8) as writer:
        for _ in range(100):
            writer.add([3, 3, 3, 1, 1, 7])
    assert token_ranks(tmp_path / "train", 8).tolist() == [0, 2, 0, 1, 0, 0, 0, 3]
