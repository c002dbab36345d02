"""Refitting one layer's output matrices: exact where the right matrices are known, never worse, the same in parts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from slimqwen.refit import matrices as refit
from slimqwen.refit.matrices import Network, squared_norm
from slimqwen.refit.ridge import RidgeSums

pytestmark = pytest.mark.rounding


class Layer(NamedTuple):
    networks: list[Network]
    features: Tensor
    """[tokens, networks, neurons], float64, zero where a network is not used: for referees."""


def a_layer(tokens: int = 200, hidden: int = 6, neurons: int = 5) -> tuple[Layer, list[Tensor], list[Tensor]]:
    """Tokens that choose two of three experts each and all of which use a fourth, output matrices that are wrong, and right ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden, generator=generator)
    weights = torch.randn(4, neurons, hidden, generator=generator)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(tokens)])
    gates = torch.rand(tokens, 4, generator=generator) + 0.1
    networks = []
    features = torch.zeros(tokens, 4, neurons, dtype=torch.float64)
    for number, weight in enumerate(weights):
        used = torch.arange(tokens) if number == 3 else (chosen == number).any(dim=1).nonzero()[:, 0]
        networks.append(Network(partial(relu_of, weight), x, used, gates[used, number]))
        features[used, number] = (relu_of(weight, x[used]) * gates[used, number, None]).double()
    wrong, right = (list(torch.randn(4, hidden, neurons, generator=generator)) for _ in range(2))
    return Layer(networks, features), wrong, right


def relu_of(weight: Tensor, x: Tensor) -> Tensor:
    return (x @ weight.T).relu()


def output_of(layer: Layer, matrices: Sequence[Tensor]) -> Tensor:
    """[tokens, hidden], float32."""
    return torch.einsum("tnk,nhk->th", layer.features, torch.stack(list(matrices)).double()).float()


def unexplained() -> Tensor:
    """A target that nothing explains, [tokens, hidden]."""
    return torch.randn(200, 6, generator=torch.Generator().manual_seed(2))


def test_the_right_matrices_are_found() -> None:
    layer, matrices, right = a_layer()
    residual = output_of(layer, right)
    list(refit.refit(layer.networks, matrices, residual, ridge=1e-9, sweeps=100))
    torch.testing.assert_close(matrices, right, rtol=1e-3, atol=1e-3)
    assert residual.abs().max() < 1e-3


def test_no_sweep_makes_it_worse() -> None:
    layer, start, _ = a_layer()
    penalty = 0.1 * float(layer.features.square().sum()) / (4 * 5)
    sums = []
    for sweeps in range(6):  # from the same start: the penalty is on the distance from there
        matrices, residual = [matrix.clone() for matrix in start], unexplained()
        errors = list(refit.refit(layer.networks, matrices, residual, ridge=0.1, sweeps=sweeps))
        assert errors[-1] == squared_norm(residual)
        change = torch.stack(matrices) - torch.stack(start)
        sums.append(errors[-1] + penalty * float(change.square().sum()))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(sums))
    assert sums[1] < 0.99 * sums[0]


def test_many_sweeps_are_the_joint_solution() -> None:
    """The referee solves for all at once, by least squares on a column for each neuron of each network, and the penalty's rows."""
    layer, matrices, _ = a_layer()
    start = torch.stack(matrices)
    columns = layer.features.flatten(1)
    penalty = 0.05 * columns.square().sum() / 20
    left = unexplained() - output_of(layer, matrices)
    rows = torch.cat([columns, penalty.sqrt() * torch.eye(20, dtype=torch.float64)])
    wanted = torch.cat([left.double(), torch.zeros(20, 6, dtype=torch.float64)])
    change = torch.linalg.lstsq(rows, wanted).solution.view(4, 5, 6).transpose(1, 2)
    list(refit.refit(layer.networks, matrices, unexplained(), ridge=0.05, sweeps=100))
    torch.testing.assert_close(torch.stack(matrices), (start + change).float(), rtol=1e-4, atol=1e-4)


def test_the_residual_is_that_of_the_rounded_matrices() -> None:
    layer, matrices, right = a_layer()
    matrices = [matrix.bfloat16() for matrix in matrices]
    target = output_of(layer, right)
    residual = target.clone()
    list(refit.refit(layer.networks, matrices, residual, ridge=1e-3, sweeps=2))
    torch.testing.assert_close(residual, target - output_of(layer, matrices), rtol=0, atol=1e-4)


def test_parts_of_the_text_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for numbers_at_once in (refit.NUMBERS_AT_ONCE, 42):  # 42: 7 tokens of 6 channels
        monkeypatch.setattr(refit, "NUMBERS_AT_ONCE", numbers_at_once)
        layer, matrices, right = a_layer()
        list(refit.refit(layer.networks, matrices, output_of(layer, right), ridge=1e-3, sweeps=2))
        results.append(matrices)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_network_without_tokens_stays() -> None:
    layer, matrices, right = a_layer()
    unused = replace(layer.networks[1], tokens=torch.zeros(0, dtype=torch.int64), gates=torch.zeros(0))
    networks = [layer.networks[0], unused, *layer.networks[2:]]
    start = [matrix.clone() for matrix in matrices]
    list(refit.refit(networks, matrices, output_of(layer, right), ridge=1e-3, sweeps=1))
    assert torch.equal(matrices[1], start[1])
    assert not torch.equal(matrices[0], start[0])


def test_networks_without_a_token_are_no_error() -> None:
    layer, matrices, _ = a_layer()
    unused = [replace(n, tokens=torch.zeros(0, dtype=torch.int64), gates=torch.zeros(0)) for n in layer.networks]
    errors = list(refit.refit(unused, matrices, unexplained(), ridge=1e-3, sweeps=2))
    assert errors == [squared_norm(unexplained())] * 3


def test_ridge_by_hand() -> None:
    """Feature 2, residual 6: from 0, D = 12 / (4 + 4) = 1.5; R was measured with a change of 1, so that 8 is to be explained."""
    sums = RidgeSums(1, 1)
    sums.add(torch.tensor([[2.0]]), torch.tensor([[6.0]]))
    assert sums.solve(torch.zeros(1, 1), 4.0).item() == pytest.approx(1.5)
    assert sums.solve(torch.ones(1, 1), 4.0).item() == pytest.approx(2.0)


# How far to go


def test_a_strong_ridge_leaves_the_matrices_and_a_weak_one_gives_least_squares() -> None:
    layer, matrices, _ = a_layer()
    start = [matrix.clone() for matrix in matrices]
    list(refit.refit(layer.networks, matrices, unexplained(), ridge=1e12, sweeps=3))
    torch.testing.assert_close(matrices, start, rtol=0, atol=1e-6)
    list(refit.refit(layer.networks, matrices, unexplained(), ridge=1e-9, sweeps=300))
    features = layer.features.flatten(1)
    best = torch.linalg.lstsq(features, unexplained().double()).solution
    torch.testing.assert_close(output_of(layer, matrices).double(), features @ best, rtol=0, atol=1e-3)


LEFT_OUT = torch.arange(200) % 2 == 1


def test_agreement_is_what_was_missing_and_what_the_refit_changes_on_what_it_has_not_seen() -> None:
    layer, matrices, right = a_layer()
    target = output_of(layer, right) + 0.5 * unexplained()
    start, wanted = [matrix.clone() for matrix in matrices], target.clone()
    scratch = torch.empty_like(target)
    found = refit.agreement(layer.networks, matrices, target, scratch, LEFT_OUT, ridge=0.1, sweeps=2)
    torch.testing.assert_close(matrices, start, rtol=0, atol=0)
    torch.testing.assert_close(target, wanted, rtol=0, atol=0)

    seen = [network.on(~LEFT_OUT) for network in layer.networks]
    list(refit.refit(seen, matrices, wanted.clone(), ridge=0.1, sweeps=2))
    missing = (wanted - output_of(layer, start)).double()[LEFT_OUT]
    change = (output_of(layer, matrices) - output_of(layer, start)).double()[LEFT_OUT]
    assert found == pytest.approx((float((missing * change).sum()), float(change.square().sum())), rel=1e-3)


def test_a_refit_is_trusted_as_far_as_text_left_out_agrees() -> None:
    assert refit.trusted_share([]) == 1
    assert refit.trusted_share([(3.0, 4.0), (1.0, 4.0)]) == 0.5
    assert refit.trusted_share([(5.0, 4.0)]) == 1
    assert refit.trusted_share([(-1.0, 4.0)]) == 0
    assert refit.trusted_share([(0.0, 0.0)]) == 0  # nothing changes


@pytest.mark.parametrize(("noise", "lowest", "highest"), [(0.0, 0.97, 1.0), (300.0, 0.0, 0.2)])
def test_noise_is_not_learnt(noise: float, lowest: float, highest: float) -> None:
    """What the networks can explain is taken whole; where nearly all is noise, nearly nothing. Never worse than the start."""
    layer, matrices, right = a_layer()
    start = [matrix.clone() for matrix in matrices]
    target = output_of(layer, right) + noise * unexplained()
    scratch = torch.empty_like(target)
    found = [
        refit.agreement(layer.networks, matrices, target, scratch, left_out, ridge=1e-3, sweeps=3)
        for left_out in (LEFT_OUT, ~LEFT_OUT)
    ]
    share = refit.trusted_share(found)
    assert lowest <= share <= highest
    residual = target.clone()
    list(refit.refit(layer.networks, matrices, residual, ridge=1e-3, sweeps=3))
    refit.take_share(layer.networks, matrices, start, residual, share)
    torch.testing.assert_close(residual, target - output_of(layer, matrices), rtol=1e-3, atol=1e-3)
    assert sum(share**2 * changed - 2 * share * agreed for agreed, changed in found) <= 0


def test_no_share_is_the_start_and_all_of_it_the_refit() -> None:
    layer, matrices, right = a_layer()
    start = [matrix.clone() for matrix in matrices]
    residual = output_of(layer, right)
    list(refit.refit(layer.networks, matrices, residual, ridge=1e-3, sweeps=3))
    refitted = [matrix.clone() for matrix in matrices]
    refit.take_share(layer.networks, matrices, start, residual, 1.0)
    torch.testing.assert_close(matrices, refitted, rtol=0, atol=0)
    refit.take_share(layer.networks, matrices, start, residual, 0.0)
    torch.testing.assert_close(matrices, start, rtol=0, atol=0)
