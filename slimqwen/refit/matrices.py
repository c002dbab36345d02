"""Refitting the matrices through which a layer's networks write into the residual stream, one after another."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimqwen.refit.ridge import RidgeSums

CPU = torch.device("cpu")

Total = Callable[[Tensor], Tensor]
"""Adds a tensor up, in place, over the ranks that have rows of the text, and returns it (`Job.total`)."""

NUMBERS_AT_ONCE = 1 << 24  # of a network's neurons, or outputs, in the making: 134 MB in float64


def of_one_rank(tensor: Tensor) -> Tensor:
    """Return the tensor: the `Total` where one rank has all rows."""
    return tensor


@dataclass(frozen=True)
class Network:
    """What the output matrix of one network (a routed expert, the shared expert, a dense MLP) reads on a text.

    neurons: from the network's input, [n, hidden], to what its output matrix multiplies, [n, neurons]. hidden_states: the
    input of the layer's networks, [text, hidden]. tokens: those that this one computes on, int64 [n]. gates: the weight
    of each output, float32 [n]. All may lie on another device than the network's weights, `device`.
    """

    neurons: Callable[[Tensor], Tensor]
    hidden_states: Tensor
    tokens: Tensor
    gates: Tensor
    device: torch.device = CPU

    def on(self, chosen: Tensor) -> "Network":
        """Return the same network on some of the text's tokens alone; chosen: bool [text]."""
        here = chosen[self.tokens]
        return replace(self, tokens=self.tokens[here], gates=self.gates[here])

    def parts(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the network's tokens, up to `size` at once, int64 [n], and its gated neurons there, float32 [n, neurons].

        The output matrix W is linear, gate (W a) = W (gate a): the network's share of the output is F W' with these F.
        """
        for tokens, gates in zip(self.tokens.split(size), self.gates.split(size), strict=True):
            neurons = self.neurons(self.hidden_states[tokens]).float()
            yield tokens, neurons * gates[:, None].to(neurons)


def refit(
    networks: Sequence[Network],
    matrices: Sequence[Tensor],
    residual: Tensor,
    *,
    ridge: float,
    sweeps: int,
    total: Total = of_one_rank,
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

    Of several ranks each has its own tokens of the text, in the networks and the residual, and all have the same matrices.
    """
    counts = total(torch.tensor([len(network.tokens) for network in networks])).tolist()
    used = [(network, matrix) for network, matrix, count in zip(networks, matrices, counts, strict=True) if count]
    squares, neurons = 0.0, 0
    for network, matrix in used:
        for tokens, features in network.parts(_at_once(max(matrix.shape))):
            squares += float(features.double().square().sum())
            _subtract(tokens, features, matrix, residual)
        neurons += matrix.shape[1]
    yield squared_norm(residual, total=total)
    squares = float(total(torch.tensor(squares, dtype=torch.float64)))
    penalty = ridge * squares / max(neurons, 1)
    start = [matrix.clone() for _, matrix in used]
    for _ in range(sweeps):
        for (network, matrix), origin in zip(used, start, strict=True) if penalty > 0 else ():
            _refit_one(network, matrix, origin, residual, penalty, total)
        yield squared_norm(residual, total=total)


def agreement(
    networks: Sequence[Network],
    matrices: Sequence[Tensor],
    target: Tensor,
    scratch: Tensor,
    left_out: Tensor,
    *,
    ridge: float,
    sweeps: int,
    total: Total = of_one_rank,
) -> tuple[float, float]:
    """Return <r, D> and <D, D> on tokens left out of a refit: r is what had been missing there, D what the refit changes there.

    The matrices are refitted to the other tokens of the target [tokens, hidden]; left_out: bool [tokens]. `scratch`, as large as
    the target, is overwritten; `matrices` and `target` stay.
    """
    refitted = [matrix.clone() for matrix in matrices]
    scratch.copy_(target)
    others = [one.on(~left_out) for one in networks]
    for _ in refit(others, refitted, scratch, ridge=ridge, sweeps=sweeps, total=total):
        pass
    elsewhere = [one.on(left_out) for one in networks]
    steps = [new.float() - old.float() for new, old in zip(refitted, matrices, strict=True)]
    scratch.copy_(target)
    subtract_outputs(elsewhere, matrices, scratch)
    # |r - a D|^2 of a = 0, 1 and 2: a parabola, and D need not be kept.
    errors = [squared_norm(scratch, left_out, total)]
    for _ in range(2):
        subtract_outputs(elsewhere, steps, scratch)
        errors.append(squared_norm(scratch, left_out, total))
    changed = (errors[0] - 2 * errors[1] + errors[2]) / 2
    return (errors[0] - errors[1] + changed) / 2, changed


def trusted_share(agreements: Sequence[tuple[float, float]]) -> float:
    """Return how much of a refit to take, 0 to 1, by the `agreement` on each fold that was left out; without folds all of it.

    The a that makes |r - a D|^2, summed over the folds, smallest is <r, D> / <D, D>; within 0 and 1 it is never worse there than
    leaving the matrices as they are.
    """
    agreed, changed = (sum(numbers) for numbers in zip(*agreements, strict=True)) if agreements else (1.0, 1.0)
    return min(max(agreed / changed, 0.0), 1.0) if changed > 0 else 0.0


def take_share(
    networks: Sequence[Network], matrices: Sequence[Tensor], start: Sequence[Tensor], residual: Tensor, share: float
) -> None:
    """Move `matrices` back, to start + share x (matrices - start); they and the residual change in place and stay consistent."""
    for network, matrix, origin in zip(networks, matrices, start, strict=True):
        shortened = (origin.double() + share * (matrix.double() - origin.double())).to(matrix.dtype)
        subtract_outputs([network], [shortened.float() - matrix.float()], residual)
        matrix.copy_(shortened)


def squared_norm(rows: Tensor, chosen: Tensor | None = None, total: Total = of_one_rank) -> float:
    """Return the sum of all squares of [tokens, hidden], or of the chosen tokens' (bool [tokens]), in float64."""
    size = _at_once(rows.shape[1])
    parts = iter(rows.split(size))
    if chosen is not None:
        parts = (part[here] for part, here in zip(parts, chosen.split(size), strict=True))
    squares = sum(float(part.double().square().sum()) for part in parts)
    return float(total(torch.tensor(squares, dtype=torch.float64)))


def _refit_one(network: Network, matrix: Tensor, start: Tensor, residual: Tensor, penalty: float, total: Total) -> None:
    """Solve for the best `matrix` [hidden, neurons] where all others stay as they are; it and `residual` change in place."""
    sums = RidgeSums(matrix.shape[1], matrix.shape[0], network.device)
    for tokens, features in network.parts(_at_once(max(matrix.shape))):
        sums.add(features, residual[tokens].to(features))
    sums.add_up(total)
    change = sums.solve(matrix.double() - start.double(), penalty)
    refitted = (start.double() + change.to(start.device)).to(matrix.dtype)
    step = refitted.float() - matrix.float()
    for tokens, features in network.parts(_at_once(max(matrix.shape))):
        _subtract(tokens, features, step, residual)
    matrix.copy_(refitted)


def subtract_outputs(networks: Sequence[Network], matrices: Sequence[Tensor], rows: Tensor) -> None:
    """Subtract the outputs of all the networks from the rows [tokens, hidden], in place."""
    for network, matrix in zip(networks, matrices, strict=True):
        for tokens, features in network.parts(_at_once(max(matrix.shape))):
            _subtract(tokens, features, matrix, rows)


def _subtract(tokens: Tensor, features: Tensor, matrix: Tensor, rows: Tensor) -> None:
    """Subtract the product of some tokens' features with the matrix [hidden, neurons] from these tokens' rows, in place."""
    rows.index_add_(0, tokens, (features @ matrix.to(features).T).to(rows.device), alpha=-1)


def _at_once(numbers: int) -> int:
    """Return the tokens of a part, of so many numbers each."""
    return max(1, NUMBERS_AT_ONCE // numbers)
