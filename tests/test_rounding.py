"""The settings that the suite is run under are in effect, and its tolerances let through roundings and nothing else."""

import os

import pytest
import torch
from conftest import THREADS
from rounding import FORWARD, GRADIENT, SUM, TRAINED, WEIGHTS, assert_trained_alike, error

pytestmark = pytest.mark.rounding


def test_the_settings_are_in_effect() -> None:
    """Vector instructions and threads; whether MKL and oneDNN follow theirs, torch does not tell."""
    assert torch.get_num_threads() == THREADS
    wanted = os.environ.get("ATEN_CPU_CAPABILITY")
    assert wanted is None or torch.backends.cpu.get_cpu_capability() == wanted.upper()


def test_another_order_is_within_the_tolerance_of_a_sum() -> None:
    """A product of the size of the tests', added up forwards, backwards and exactly; another term is far outside."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 256, generator=generator), torch.randn(256, 64, generator=generator)
    exact = a.double() @ b.double()
    for found in (a @ b, a.flip(1) @ b.flip(0), sum(a[:, [i]] * b[[i]] for i in range(256))):
        assert 0 < error(found, exact) < SUM
    assert error(a[:, 1:] @ b[1:], exact) > 10 * TRAINED


def test_tolerances_grow_with_the_work() -> None:
    assert SUM < FORWARD < GRADIENT < TRAINED < 1e-2


def test_trained_weights_may_differ_where_a_gradient_was_rounding() -> None:
    weights = torch.zeros(1000)
    one, all_a_little = weights.clone(), weights + 2 * WEIGHTS * 1e-3
    one[7] = 2e-3
    assert_trained_alike({"w": one}, {"w": weights})
    with pytest.raises(AssertionError, match="w"):
        assert_trained_alike({"w": all_a_little}, {"w": weights})


def test_nothing_compares_with_what_is_no_number() -> None:
    assert not error(torch.tensor([torch.nan, 1.0]), torch.ones(2)) < TRAINED
