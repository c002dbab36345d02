"""The schedules at the points their docstrings name."""

import math

import pytest

from slimqwen.distillation.schedules import kd_weight, learning_rate, mtp_weight
from slimqwen.recipe import Ramp


def test_kd_weight_is_linear() -> None:
    ramp = Ramp(start=1.0, end=0.75)
    assert [kd_weight(x, ramp) for x in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.875, 0.75])


def test_mtp_weight_is_half_a_cosine() -> None:
    ramp = Ramp(start=0.3, end=0.1)
    quarter = 0.1 + 0.2 * (1 + math.sqrt(0.5)) / 2
    assert [mtp_weight(x, ramp) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.3, quarter, 0.2, 0.1])
    assert mtp_weight(0.5, Ramp(start=0.0, end=1.0)) == pytest.approx(0.5)


def test_learning_rate_by_hand() -> None:
    """4 steps of warm-up to 8, then 4 steps of half a cosine to 0."""
    rates = [learning_rate(step, total_steps=8, warmup_steps=4, peak=8.0, final=0.0) for step in range(8)]
    cosine = [4 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3, 4)]
    assert rates == pytest.approx([2, 4, 6, 8, *cosine])


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0, total_steps=5, warmup_steps=0, peak=4e-4, final=3e-5) == pytest.approx(4e-4)
    assert learning_rate(4, total_steps=5, warmup_steps=0, peak=4e-4, final=3e-5) == pytest.approx(3e-5)


@pytest.mark.parametrize("total_steps", [1, 3, 4])
def test_a_run_no_longer_than_its_warmup_only_warms_up(total_steps: int) -> None:
    rates = [learning_rate(step, total_steps, warmup_steps=4, peak=8.0, final=1.0) for step in range(total_steps)]
    assert rates == pytest.approx([2.0, 4.0, 6.0, 8.0][:total_steps])


@pytest.mark.parametrize(("total_steps", "warmup_steps"), [(1, 0), (2, 1), (5, 4), (100, 10)])
def test_learning_rate_rises_to_the_peak_then_falls_to_the_end(total_steps: int, warmup_steps: int) -> None:
    rates = [learning_rate(step, total_steps, warmup_steps, peak=1.0, final=0.1) for step in range(total_steps)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(1.0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if total_steps > max(warmup_steps, 1):
        assert rates[-1] == pytest.approx(0.1)
