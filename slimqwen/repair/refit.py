"""Refitting the matrices through which a layer's networks write into the residual stream, one after another."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from slimqwen.repair.ridge import RidgeSums

NUMBERS_AT_ONCE = 1 << 24  # of a network's neurons, or outputs, in the making: 134 MB in float64


@dataclass(frozen=True)
class Network:
    """What the output matrix of one network (a routed expert, the shared expert, a dense MLP) reads on a text.

    neurons: from what the network is asked, [n, hidden], to what its output matrix multiplies, [n, neurons]. hidden_states:
    what the layer's networks are asked, [text, hidden]. tokens: those that this one answers, int64 [n]. gates: the weight
    of each answer, float32 [n]. All may lie on another device than the network's weights.
    """

    neurons: Callable[[Tensor], Tensor]
    hidden_states: Tensor
    tokens: Tensor
    gates: Tensor

    def parts(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The network's tokens, up to `size` at once, int64 [n], and its gated neurons there, float32 [n, neurons].

        The output matrix W is linear, gate (W a) = W (gate a): the network's share of the output is F W' with these F.
        """
        for tokens, gates in zip(self.tokens.split(size), self.gates.split(size), strict=True):
            neurons = self.neurons(self.hidden_states[tokens]).float()
            yield tokens, neurons * gates[:, None].to(neurons)


def refit(
    networks: Sequence[Network], matrices: Sequence[Tensor], residual: Tensor, *, ridge: float, sweeps: int
) -> Iterator[float]:
    """Change `matrices`, [hidden, neurons] of each network, so that together they explain more of a target.

    Yields |residual|^2 before the first sweep and after each: it has to be read to its end.

    `residual` [tokens, hidden] float32 comes as the target, and is from the first yield on what the matrices leave of it.
    Both are changed in place and stay consistent, with the matrices as rounded to their dtype. Networks without a token stay
    as they are.

    Minimises |target - sum_e F_e W_e'|^2 + penalty sum_e |W_e - W_e(start)|^2 by block coordinate descent: network after
    network is solved exactly against what the others leave. No sweep raises the sum, and there is never more than one
    system of neurons x neurons, in float64. The penalty is `ridge` times the mean, over all neurons, of a neuron's sum of
    squares: one number for all networks, so that one with few tokens stays nearer to where it was.
    """
    asked = [(network, matrix) for network, matrix in zip(networks, matrices, strict=True) if len(network.tokens)]
    squares, neurons = 0.0, 0
    for network, matrix in asked:
        for tokens, features in network.parts(_at_once(max(matrix.shape))):
            squares += float(features.double().square().sum())
            _subtract(tokens, features, matrix, residual)
        neurons += matrix.shape[1]
    yield squared_norm(residual)
    penalty = ridge * squares / max(neurons, 1)
    start = [matrix.clone() for _, matrix in asked]
    for _ in range(sweeps):
        for (network, matrix), origin in zip(asked, start, strict=True) if penalty > 0 else ():
            _refit_one(network, matrix, origin, residual, penalty)
        yield squared_norm(residual)


def squared_norm(rows: Tensor) -> float:
    """The sum of all squares of [tokens, hidden], in float64."""
    return float(sum(part.double().square().sum() for part in rows.split(_at_once(rows.shape[1]))))


def _refit_one(network: Network, matrix: Tensor, start: Tensor, residual: Tensor, penalty: float) -> None:
    """The best `matrix` [hidden, neurons] where all others stay as they are; it and `residual` change in place."""
    sums = RidgeSums()
    for tokens, features in network.parts(_at_once(max(matrix.shape))):
        sums.add(features, residual[tokens].to(features))
    change = sums.solve(matrix.double() - start.double(), penalty)
    refitted = (start.double() + change.to(start.device)).to(matrix.dtype)
    step = refitted.float() - matrix.float()
    for tokens, features in network.parts(_at_once(max(matrix.shape))):
        _subtract(tokens, features, step, residual)
    matrix.copy_(refitted)


def _subtract(tokens: Tensor, features: Tensor, matrix: Tensor, rows: Tensor) -> None:
    """What the matrix [hidden, neurons] makes of some tokens' features, from these tokens' rows."""
    rows.index_add_(0, tokens, (features @ matrix.to(features).T).to(rows.device), alpha=-1)


def _at_once(numbers: int) -> int:
    """Tokens in a part, of so many numbers each."""
    return max(1, NUMBERS_AT_ONCE // numbers)
