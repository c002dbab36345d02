"""How far apart two computations of the same numbers may end: the tolerances of all tests that compare arithmetic.

Equal bits are promised, and tested, where the code makes sure of them on any processor: what is read and written without
arithmetic, the same command again with the same number of threads, resumed against uninterrupted, the same weights in
another file. Two different computations add up in another order, and that order is the processor's, so what they share is
a number of roundings: float32 rounds by up to eps / 2 = 2^-24 of a number, and the order of n additions changes their sum
by about sqrt(n) roundings of its largest terms.

Every tolerance is a share of the largest entry of what is compared. An entry far smaller than that is what is left where
large ones cancel, and its own size says nothing of its error.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps  # 1.2e-7

SUM = 32 * EPS  # 3.8e-6: one or two products or sums, of up to some hundred terms
FORWARD = (
    1024 * EPS
)  # 1.2e-4: a tiny model's pass: thirty such sums in a row, and weights that magnify what came before
GRADIENT = 2 * FORWARD  # 2.4e-4: there and back, summed over tokens whose contributions cancel
# Some steps of Adam later: losses and norms of gradients. Where a gradient is nothing but rounding Adam makes a whole step
# of it, in either direction.
TRAINED = 8 * GRADIENT  # 2.0e-3
WEIGHTS = 0.01  # of the learning rate, the mean difference of a tensor's trained weights: few entries are such


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest entry of `expected`; 0 where both are nothing but zeros."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    largest = expected.abs().max().item()
    difference = (found.detach().double() - expected.detach().double()).abs().max().item()
    return difference / largest if largest else difference


def assert_trained_alike(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], learning_rate: float = 1e-3
) -> None:
    """Weights after some steps of Adam."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().mean() < WEIGHTS * learning_rate, name
