"""Ridge regression from sums: rows are added in chunks, and only what the solution needs is kept."""

import torch
from torch import Tensor


class RidgeSums:
    """F'F and F'R of features F [rows, features] and of what they are to explain, R [rows, outputs], in float64."""

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._moment: Tensor | None = None

    def add(self, features: Tensor, residual: Tensor) -> None:
        """Add some rows, [rows, features] and [rows, outputs]."""
        features = features.double()
        gram, moment = features.T @ features, features.T @ residual.double()
        self._gram = gram if self._gram is None else self._gram.add_(gram)
        self._moment = moment if self._moment is None else self._moment.add_(moment)

    def solve(self, change: Tensor, penalty: float) -> Tensor:
        """Return the D [outputs, features], float64, that minimises |R + F C' - F D'|^2 + penalty |D|^2.

        C is the `change`, of the same shape, that had been made when R was measured: what it explains is given back before
        D is chosen. With C = 0 this is ridge regression, D' = (F'F + penalty)^-1 F'R.
        """
        assert self._gram is not None and self._moment is not None
        moment = self._moment + self._gram @ change.to(self._gram).T
        ridge = penalty * torch.eye(len(self._gram), dtype=torch.float64, device=self._gram.device)
        solved: Tensor = torch.cholesky_solve(moment, torch.linalg.cholesky(self._gram + ridge)).T
        return solved
