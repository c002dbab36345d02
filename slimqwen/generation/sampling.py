"""Sampling of tokens, and acceptance of drafts that preserves the backbone's distribution."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from slimqwen.core.errors import UserError
from slimqwen.recipe.section import SMALLEST


@dataclass(frozen=True)
class Sampling:
    """The settings by which logits become the distribution that tokens are drawn from.

    temperature: divides the logits; 0 is greedy. top_p: only the most likely tokens with together at least this
    probability are drawn (arXiv 1904.09751). Raises UserError for invalid values.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0.0 and not SMALLEST <= self.temperature < float("inf"):
            raise UserError(
                f"temperature {self.temperature:g} must be 0 (greedy) or a number of at least {SMALLEST:g}."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p {self.top_p:g} must be above 0 and at most 1 (every token).")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution of the next token, float32 [..., vocab], from logits [..., vocab].

        Greedy decoding is the distribution that is 1 at the most likely token, so one rule covers both.
        """
        logits = logits.float()
        if self.temperature == 0.0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        probabilities = (logits / self.temperature).softmax(-1)
        if self.top_p < 1.0:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            more_likely = ordered.cumsum(-1) - ordered  # the probability of all more likely tokens
            ordered = ordered.masked_fill(more_likely >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities


GREEDY = Sampling()


def draw(weights: Tensor, generator: Generator) -> Tensor:
    """Draw a token with probability proportional to its weight, int64 [1]. weights: [vocab], not all 0."""
    return torch.multinomial(weights, 1, generator=generator)


def accept(target: Tensor, drafted: Tensor, drafts: Tensor, generator: Generator) -> tuple[int, int]:
    """Return how many drafts are accepted, and the token that follows them (arXiv 2211.17192, algorithm 1).

    A draft x, drawn from q, is accepted with probability min(1, p(x) / q(x)). At the first rejection, the next
    token is drawn from max(p - q, 0), normalised; after the last draft, from the backbone's p. So every token has the
    backbone's distribution, whatever the drafts. Greedily (p and q are 1 at one token each) this means: accept the drafts
    that are the backbone's choices, then append the backbone's choice.

    Example, greedy: drafts E X G where the backbone chooses E F G H: 1 accepted, then F.

    Args:
        target: p, the backbone's distribution at each draft and after the last one, [drafts + 1, vocab].
        drafted: q, the distribution that each draft was drawn from, [drafts, vocab].
        drafts: int64 [drafts]; may be empty.
    """
    count = len(drafts)
    p = target[:count].gather(-1, drafts[:, None])[:, 0]
    q = drafted.gather(-1, drafts[:, None])[:, 0]
    passed = torch.rand(count, generator=generator, device=q.device) * q < p
    accepted = int(passed.long().cumprod(0).sum())
    rest = target[accepted]
    if accepted < count:
        rest = (rest - drafted[accepted]).clamp(min=0.0)
        if not rest.any():  # p = q up to rounding, which caused the rejection
            rest = target[accepted]
    return accepted, int(draw(rest, generator))
