"""The course of a run and the schedules over it, at the points their docstrings name."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from slimqwen.core.errors import UserError
from slimqwen.planning.progressive import stage_steps
from slimqwen.recipe import DistilRecipe, Ramp
from slimqwen.training.course import Course, Level, compute_course
from slimqwen.training.schedules import kd_weight, learning_rate, mtp_weight
from slimqwen.training.span import parse_span
from slimqwen.training.trainer import Span


def course(tokens: int, sequence_length: int = 2, **settings: Any) -> Course:
    return compute_course(DistilRecipe.model_validate({"tokens": tokens, **settings}), sequence_length)


def even(total_steps: int, warmup_steps: int) -> Course:
    """Without a ramp."""
    return Course((Level(0, 0, 3),), 2, total_steps, warmup_steps)


def of_each_step(course: Course) -> list[range]:
    """The rows of each step."""
    firsts = [course.first_row(step) for step in range(course.total_steps)]
    return [range(first, first + course.rows(step)) for step, first in enumerate(firsts)]


# --- the course --------------------------------------------------------------------------------------------------------


def test_a_growing_batch_by_hand() -> None:
    """The example of Course's docstring: 1 row for 4 tokens, 2 for 4, then 3."""
    found = course(20, batch_size=3, batch_size_ramp={"start": 1, "tokens": 8})
    assert [list(rows) for rows in of_each_step(found)] == [[0], [1], [2, 3], [4, 5, 6], [7, 8, 9]]
    assert [found.tokens(step) for step in range(6)] == [0, 2, 4, 8, 14, 20]
    assert [found.progress(step) for step in range(5)] == [0, 1 / 7, 2 / 7, 4 / 7, 1]
    assert [found.reaches_multiple(step, 8) for step in range(5)] == [
        False,
        False,
        True,
        False,
        True,
    ]  # at 8 and over 16 tokens


@pytest.mark.parametrize(
    ("tokens", "batch_size", "ramp"),
    [
        (1000, 8, {"start": 2, "tokens": 333}),
        (1000, 8, {"start": 4, "tokens": 1}),  # a step passes the end of the ramp at once
        (1000, 64, {"start": 1, "tokens": 100}),  # steps pass the end of several sizes
        (60, 8, {"start": 2, "tokens": 10_000}),  # the run ends first
    ],
)
def test_a_ramp_leaves_no_row_out_and_none_twice(tokens: int, batch_size: int, ramp: dict[str, int]) -> None:
    found = course(tokens, batch_size=batch_size, batch_size_ramp=ramp)
    rows = of_each_step(found)
    assert [row for step in rows for row in step] == list(range(found.first_row(found.total_steps)))
    sizes = [len(step) for step in rows]
    assert sizes == sorted(sizes) and sizes[0] == ramp["start"]
    assert all(size % ramp["start"] == 0 and size <= batch_size for size in sizes)
    assert found.tokens(found.total_steps) <= tokens < found.tokens(found.total_steps + 1)
    for step, size in enumerate(sizes):  # a size is too small for no more than one step
        due = 1 + found.tokens(step) * (batch_size // ramp["start"] - 1) // ramp["tokens"]
        assert size == min(due * ramp["start"], batch_size)


def test_without_a_ramp_everything_goes_by_steps() -> None:
    """To the bit: the same divisions of whole numbers as of steps, whatever the batch."""
    found = course(2 * 7 * 101, batch_size=7)
    assert found.total_steps == 101 and found.levels == (Level(0, 0, 7),)
    assert [found.progress(step) for step in range(101)] == [step / 100 for step in range(101)]
    assert found.first_row(5) == 35 and course(13, batch_size=7).total_steps == 0
    fractions = [0.1, 0.25, 0.65]
    assert found.step_fractions(fractions) == fractions
    assert course(14, batch_size=7).progress(0) == 0.0


def test_stages_get_their_share_of_the_tokens() -> None:
    found = course(4000, batch_size=10, batch_size_ramp={"start": 1, "tokens": 900})
    first, second = stage_steps(found.step_fractions([0.25, 0.75]), found.total_steps)
    assert found.tokens(first) == pytest.approx(1000, abs=20) and first + second == found.total_steps
    assert first > 0.4 * found.total_steps


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (4, 2), (5, 3), (8, 3), (9, 4), (10**6, 166_669)])
def test_a_warmup_in_tokens_takes_the_steps_that_train_on_them(tokens: int, steps: int) -> None:
    ramp = {"start": 1, "tokens": 8}
    assert course(20, batch_size=3, batch_size_ramp=ramp, warmup=f"{tokens} tokens").warmup_steps == steps


def test_a_warmup_is_in_steps_or_in_tokens() -> None:
    assert course(20).warmup_steps == 2000  # the paper's
    assert course(20, warmup="0 steps").warmup_steps == 0
    with pytest.raises(ValidationError, match="must be in steps or tokens"):
        course(20, warmup="5 min")


@pytest.mark.parametrize("start", [3, 8, 16])
def test_a_ramp_that_does_not_lead_to_the_batch(start: int) -> None:
    with pytest.raises(ValidationError, match=f"divisor of batch_size 8 below it, is {start}"):
        course(20, batch_size=8, batch_size_ramp={"start": start, "tokens": 4})


# --- the schedules -----------------------------------------------------------------------------------------------------


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
    rates = [learning_rate(step, even(8, 4), peak=8.0, final=0.0) for step in range(8)]
    cosine = [4 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3, 4)]
    assert rates == pytest.approx([2, 4, 6, 8, *cosine])


@pytest.mark.parametrize(("total_steps", "warmup_steps"), [(101, 0), (101, 7), (1000, 333)])
def test_without_a_ramp_the_cosine_goes_by_steps_to_the_bit(total_steps: int, warmup_steps: int) -> None:
    peak_step = max(warmup_steps - 1, 0)
    for step in range(warmup_steps, total_steps):
        cosine = 0.5 * (1 + math.cos(math.pi * ((step - peak_step) / (total_steps - 1 - peak_step))))
        assert learning_rate(step, even(total_steps, warmup_steps), 4e-4, 3e-5) == 3e-5 + (4e-4 - 3e-5) * cosine


def test_learning_rate_falls_over_tokens() -> None:
    """Steps of 1, 1, 2, 3 and 3 rows: from row 1, where the warm-up ends, 1/6, 3/6 and 6/6 of the way to the last."""
    found = course(20, batch_size=3, batch_size_ramp={"start": 1, "tokens": 8}, warmup="4 tokens")
    rates = [learning_rate(step, found, peak=2.0, final=0.0) for step in range(5)]
    assert rates == pytest.approx([1.0, 2.0, *(1 + math.cos(math.pi * done) for done in (1 / 6, 3 / 6, 1))])


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0, even(5, 0), peak=4e-4, final=3e-5) == pytest.approx(4e-4)
    assert learning_rate(4, even(5, 0), peak=4e-4, final=3e-5) == pytest.approx(3e-5)


@pytest.mark.parametrize("total_steps", [1, 3, 4])
def test_a_run_no_longer_than_its_warmup_only_warms_up(total_steps: int) -> None:
    rates = [learning_rate(step, even(total_steps, 4), peak=8.0, final=1.0) for step in range(total_steps)]
    assert rates == pytest.approx([2.0, 4.0, 6.0, 8.0][:total_steps])


@pytest.mark.parametrize(("total_steps", "warmup_steps"), [(1, 0), (2, 1), (5, 4), (100, 10)])
def test_learning_rate_rises_to_the_peak_then_falls_to_the_end(total_steps: int, warmup_steps: int) -> None:
    rates = [learning_rate(step, even(total_steps, warmup_steps), peak=1.0, final=0.1) for step in range(total_steps)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(1.0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if total_steps > max(warmup_steps, 1):
        assert rates[-1] == pytest.approx(0.1)


def test_the_span_of_a_stage_by_hand() -> None:
    assert parse_span("0:16", 160) == Span(0, 16, 160)
    assert parse_span("16:160", 160) == Span(16, 160, 160)
    for wrong in ("16", "16:", ":16", "16:16", "17:16", "0:161", "-1:5", "a:b"):
        with pytest.raises(UserError, match="write it as FIRST:END"):
            parse_span(wrong, 160)
