"""Refitting the matrices through which routed experts write into the residual stream, one expert after another."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from slimqwen.calibration.experts import Pairs
from slimqwen.repair.ridge import RidgeSums

PAIRS_AT_ONCE = 8192  # (token, expert) pairs in the making: of 512 neurons and 2,048 channels 34 and 67 MB in float64


@dataclass(frozen=True)
class ExpertInputs:
    """What each routed expert's down projection reads on a text.

    experts: Transformers' module, of which `gate_up_proj[expert]` and the activation are used. hidden_states: what the module
    is asked, [tokens, hidden]. pairs: which expert answers which token, with what gate; both may lie on another
    device than the weights.
    """

    experts: Any
    hidden_states: Tensor
    pairs: Pairs

    def of_expert(self, expert: int, pairs: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """The expert's tokens in parts, int64 [n], and its gated neurons there, float32 [n, neurons].

        The down projection W is linear, gate (W a) = W (gate a): the expert's share of the output is F W' with these F.
        """
        weight = self.experts.gate_up_proj[expert]
        for start in range(pairs.start, pairs.stop, PAIRS_AT_ONCE):
            some = slice(start, min(start + PAIRS_AT_ONCE, pairs.stop))
            tokens = self.pairs.tokens[some]
            neurons = self.experts._apply_gate(F.linear(self.hidden_states[tokens].to(weight), weight)).float()
            yield tokens, neurons * self.pairs.gates[some, None].to(neurons)


def refit(inputs: ExpertInputs, matrices: Tensor, residual: Tensor, *, ridge: float, sweeps: int) -> Iterator[float]:
    """Change `matrices` [experts, hidden, neurons] so that the experts together explain more of a target.

    Yields |residual|^2 before the first sweep and after each: it has to be read to its end.

    `residual` [tokens, hidden] float32 is what the matrices leave of the target; both are changed in place and stay
    consistent, with the matrices as rounded to their dtype. Experts without a token stay as they are.

    Minimises |target - sum_e F_e W_e'|^2 + penalty sum_e |W_e - W_e(start)|^2 by block coordinate descent: expert after
    expert is solved exactly against what the others leave. No sweep raises the sum, and there is never more than one system of
    neurons x neurons, in float64. The penalty is `ridge` times the mean, over all neurons, of a neuron's sum of squares:
    one number for all experts, so that one with few tokens stays nearer to where it was.
    """
    penalty = ridge * _mean_sum_of_squares(inputs)
    yield squared_norm(residual)
    start = matrices.clone()
    for _ in range(sweeps):
        for expert, pairs in inputs.pairs.by_expert() if penalty > 0 else ():
            _refit_one(inputs, expert, pairs, matrices[expert], start[expert], residual, penalty)
        yield squared_norm(residual)


def subtract_outputs(inputs: ExpertInputs, matrices: Tensor, target: Tensor) -> None:
    """Turn `target` [tokens, hidden] into what the experts' outputs with these matrices leave of it, in place."""
    for expert, pairs in inputs.pairs.by_expert():
        _subtract(inputs, expert, pairs, matrices[expert].float(), target)


def squared_norm(rows: Tensor) -> float:
    """The sum of all squares of [tokens, hidden], in float64."""
    return float(sum(part.double().square().sum() for part in rows.split(PAIRS_AT_ONCE)))


def _refit_one(
    inputs: ExpertInputs, expert: int, pairs: slice, matrix: Tensor, start: Tensor, residual: Tensor, penalty: float
) -> None:
    """The best `matrix` [hidden, neurons] where all others stay as they are; it and `residual` change in place."""
    sums = RidgeSums()
    for tokens, features in inputs.of_expert(expert, pairs):
        sums.add(features, residual[tokens].to(features))
    change = sums.solve((matrix.double() - start.double()), penalty)
    refitted = (start.double() + change.to(start.device)).to(matrix.dtype)
    _subtract(inputs, expert, pairs, refitted.float() - matrix.float(), residual)
    matrix.copy_(refitted)


def _subtract(inputs: ExpertInputs, expert: int, pairs: slice, matrix: Tensor, rows: Tensor) -> None:
    for tokens, features in inputs.of_expert(expert, pairs):
        rows.index_add_(0, tokens, (features @ matrix.to(features).T).to(rows.device), alpha=-1)


def _mean_sum_of_squares(inputs: ExpertInputs) -> float:
    """Of the gated neurons of all experts that have tokens."""
    total, neurons = 0.0, 0
    for expert, pairs in inputs.pairs.by_expert():
        for _, features in inputs.of_expert(expert, pairs):
            total += float(features.double().square().sum())
        neurons += features.shape[1]
    return total / max(neurons, 1)
