"""Ridge regression from sums: rows are added in chunks, and only what the solution needs is kept."""

from collections.abc import Callable

import torch
from torch import Tensor


class RidgeSums:
    """F'F and F'R of features F [rows, features] and of what they are to explain, R [rows, outputs], in float64."""

    def __init__(self, features: int, outputs: int, device: torch.device | None = None) -> None:
        self._sums = torch.zeros(features * (features + outputs), dtype=torch.float64, device=device)
        self._gram = self._sums[: features**2].view(features, features)
        self._moment = self._sums[features**2 :].view(features, outputs)

    def add(self, features: Tensor, residual: Tensor) -> None:
        """Add some rows, [rows, features] and [rows, outputs]."""
        features = features.double()
        self._gram += features.T @ features
        self._moment += features.T @ residual.double()

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add up the rows of all ranks: `total` does so with a tensor, in place."""
        total(self._sums)

    def solve(self, change: Tensor, penalty: float) -> Tensor:
        """Return the D [outputs, features], float64, that minimises |R + F C' - F D'|^2 + penalty |D|^2.

        C is the `change`, of the same shape, that had been made when R was measured: what it explains is given back before
        D is chosen. With C = 0 this is ridge regression, D' = (F'F + penalty)^-1 F'R.
        """
        moment = self._moment + self._gram @ change.to(self._gram).T
        ridge = penalty * torch.eye(len(self._gram), dtype=torch.float64, device=self._gram.device)
        solved: Tensor = torch.cholesky_solve(moment, torch.linalg.cholesky(self._gram + ridge)).T
        return solved
