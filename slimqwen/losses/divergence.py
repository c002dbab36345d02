"""How far the student's distribution over the vocabulary is from the teacher's, and the gradient of that distance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slimqwen.core.registry import Registry
from slimqwen.recipe import DivergenceName


def softmax_dtype(logits: Tensor) -> torch.dtype:
    """Return float32, or float64 where the logits are; the gradient of the head is summed in it too."""
    return torch.promote_types(logits.dtype, torch.float32)


class Distribution(NamedTuple):
    """A softmax over the vocabulary, as its logarithm and itself: both [rows, vocab]."""

    log_probs: Tensor
    probs: Tensor

    @classmethod
    def of(cls, logits: Tensor, out: "Distribution | None" = None) -> "Distribution":
        """Compute the softmax of [rows, vocab] logits, in `softmax_dtype`; `out` is overwritten."""
        log_probs, probs = out or (None, None)
        log_probs = torch.log_softmax(logits, dim=1, dtype=softmax_dtype(logits), out=log_probs)
        return cls(log_probs, torch.exp(log_probs, out=probs))

    def rows(self, count: int) -> "Distribution":
        """Return the first rows, sharing memory."""
        return Distribution(self.log_probs[:count], self.probs[:count])

    def kl(self, other: "Distribution", scratch: Tensor | None = None) -> Tensor:
        """Compute KL(self || other) = sum_v self_v (log self_v - log other_v), in nats, [rows]; exactly 0 between equals.

        scratch: [rows, vocab] to be overwritten.
        """
        return torch.sub(self.log_probs, other.log_probs, out=scratch).mul_(self.probs).sum(1)


@dataclass(frozen=True)
class Divergence:
    """What the KD terms of the loss minimise, with p the teacher's and q the student's distribution.

    name: the formula, one of `FORMULAS`.
    temperature: p and q are the softmax of logits / temperature, and the divergence is multiplied by temperature^2, so
        that its gradient keeps its size (arXiv 1503.02531, section 2).
    jsd_beta: the share of p in the mixture of `jsd`.
    """

    name: DivergenceName = DivergenceName.FORWARD_KL
    temperature: float = 1.0
    jsd_beta: float = 0.5

    @property
    def is_forward_kl(self) -> bool:
        """Whether this is KL(teacher || student) itself, which is reported too and is computed once then."""
        return self.name == DivergenceName.FORWARD_KL and self.temperature == 1.0

    def value_and_gradient(
        self, teacher: Distribution, student: Distribution, scratch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the divergence, [rows], and its gradient by the student's logits, [rows, vocab].

        Args:
            teacher, student: at temperature 1.
            scratch: [rows, vocab], room for the gradient, which the forward KL uses.
        """
        t = self.temperature
        p = teacher if t == 1.0 else Distribution.of(teacher.log_probs / t)
        q = student if t == 1.0 else Distribution.of(student.log_probs / t)
        value, gradient = FORMULAS[self.name](p, q, self, scratch)
        return (value, gradient) if t == 1.0 else (value * t**2, gradient * t)


Formula = Callable[[Distribution, Distribution, Divergence, Tensor | None], tuple[Tensor, Tensor]]
FORMULAS: Registry[DivergenceName, Formula] = Registry(DivergenceName)
"""Each divergence of p and q, [rows], with its gradient by the logits that q is the softmax of, [rows, vocab].

A formula takes p, q, the `Divergence` with its settings, and [rows, vocab] of memory that it may overwrite."""


@FORMULAS.entry(DivergenceName.FORWARD_KL)
def forward_kl(p: Distribution, q: Distribution, _: Divergence, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute KL(p || q), the cross entropy with the teacher up to the teacher's entropy."""
    return p.kl(q, scratch), torch.sub(q.probs, p.probs, out=scratch)


@FORMULAS.entry(DivergenceName.REVERSE_KL)
def reverse_kl(p: Distribution, q: Distribution, _: Divergence, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute KL(q || p)."""
    ratio = q.log_probs - p.log_probs
    value = (q.probs * ratio).sum(1)
    return value, q.probs * (ratio - value[:, None])


@FORMULAS.entry(DivergenceName.JSD)
def jsd(p: Distribution, q: Distribution, settings: Divergence, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (arXiv 2306.13649, section 2)."""
    beta = settings.jsd_beta
    # Beyond e^80 a probability of q is 0 to float32; without the bound, infinity times that 0 would be NaN.
    p_over_q = (p.log_probs - q.log_probs).clamp_(max=80.0)  # in logarithms, as m_over_q
    m_over_q = p_over_q.exp().mul_(beta).add_(1.0 - beta).log_()
    kl_p_m = (p.probs * (p_over_q - m_over_q)).sum(1)
    kl_q_m = -(q.probs * m_over_q).sum(1)
    gradient = (m_over_q + kl_q_m[:, None]).mul_(q.probs).mul_(beta - 1.0)
    return beta * kl_p_m + (1.0 - beta) * kl_q_m, gradient


FORWARD_KL = Divergence()
