"""Refitting the readers of a narrower stream: ridge regression around the plain rotation, as strong as text left out allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Ridges to choose from, in units of the mean variance of a kept coordinate. Weaker ones win nothing on text like the
# calibration's and lose on other text, which halves of one text cannot show (docs/beyond-the-paper.md).
STRENGTHS = (3e-2, 1e-1, 3e-1, 1.0, 3.0)


@dataclass(frozen=True)
class Reading:
    """The prediction of z, a norm's normalised input, from what a cut keeps of it, y = T'z, in float64.

        z ~ R y,  R = P + (C T - P K) (K + ridge)^-1,  K = T'C T,  ridge = strength x mean diagonal entry of K

    minimises E|z - R y|^2 + ridge |R - P|^2: a weak ridge gives least squares, a strong one the plain rotation P. For any
    W that reads z, W R is the best reader of y in the same sense.

    moment: C = E[z z'], [hidden, hidden]; coordinates: T, [hidden, kept]; plain: P, [hidden, kept].
    """

    moment: Tensor
    coordinates: Tensor
    plain: Tensor

    def reader(self, strength: float) -> Tensor:
        """Solve for R, [hidden, kept]."""
        return self.plain + (self._told * self._damping(strength)) @ self._axes.T

    def saved(self, strength: float, elsewhere: Tensor) -> float:
        """Return E|z - P y|^2 - E|z - R y|^2 on other text, of whose z `elsewhere` [hidden, hidden] are the second moments.

        Along the principal axes U of K, y~ = U'y and R = P + G D U' with the diagonal D = 1 / (K + ridge), so it is
        2 trace(D G'E[(z - P y) y~']) - trace(D G'G D E[y~ y~']).
        """
        seen = elsewhere @ (self.coordinates @ self._axes)  # E[z y~']
        kept = self._axes.T @ (self.coordinates.T @ seen)
        missed = seen - self.plain @ (self._axes @ kept)
        damping = self._damping(strength)
        linear = (self._told * missed).sum(dim=0) @ damping
        square = damping @ ((self._told.T @ self._told) * kept) @ damping
        return float(2 * linear - square)

    @cached_property
    def _principal(self) -> tuple[Tensor, Tensor]:
        variances, axes = torch.linalg.eigh(self.coordinates.T @ self.moment @ self.coordinates)
        return variances.clamp(min=0.0), axes

    @property
    def _axes(self) -> Tensor:
        """U, [kept, kept]."""
        return self._principal[1]

    @cached_property
    def _told(self) -> Tensor:
        """G = (C T - P K) U, [hidden, kept]: what P gets wrong, along each principal axis of y."""
        seen = self.moment @ self.coordinates
        return (seen - self.plain @ (self.coordinates.T @ seen)) @ self._axes

    def _damping(self, strength: float) -> Tensor:
        variances = self._principal[0]
        return 1 / (variances + strength * variances.mean())


def best_strength(folds: Sequence[tuple[Reading, Tensor]]) -> float | None:
    """Return the one of STRENGTHS that saves most on the text left out, summed over the folds; None where none saves anything.

    folds: what was fitted on the other text, and the second moments of the text left out. Without folds there is nothing
    to choose by, and the weakest is taken.
    """
    if not folds:
        return STRENGTHS[0]
    saved = {strength: sum(one.saved(strength, elsewhere) for one, elsewhere in folds) for strength in STRENGTHS}
    best = max(STRENGTHS, key=saved.__getitem__)
    return best if saved[best] > 0 else None


def strengths_in_words(strengths: Mapping[str, float | None]) -> str:
    """Return the range of strengths: "ridge 0.03 to 0.3 (2 of 61 norms left as rotated)"."""
    used = [strength for strength in strengths.values() if strength is not None]
    left = len(strengths) - len(used)
    if not used:
        return "left as rotated: on calibration text that was left out no refit helped"
    ridge = f"ridge {min(used):g}" + (f" to {max(used):g}" if max(used) > min(used) else "")
    return ridge + (f" ({left} of {len(strengths)} norms left as rotated)" if left else "")
