"""Choosing a token, and judging drafted ones so that the backbone's distribution is kept."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from slimqwen.core.errors import UserError
from slimqwen.recipe.section import SMALLEST


@dataclass(frozen=True)
class Sampling:
    """How logits become the distribution that tokens are drawn from.

    temperature: divides the logits; 0 is greedy. top_p: only the most likely tokens that together have at least this
    probability (arXiv 1904.09751). Raises UserError for values that mean nothing.
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
        """The distribution of the next token, float32 [..., vocab] of the logits [..., vocab].

        Greedy is the distribution that is 1 at the most likely token. It makes one rule of both kinds of decoding.
        """
        logits = logits.float()
        if self.temperature == 0.0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        probabilities = (logits / self.temperature).softmax(-1)
        if self.top_p < 1.0:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            more_likely = ordered.cumsum(-1) - ordered  # what the tokens before have together
            ordered = ordered.masked_fill(more_likely >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities


GREEDY = Sampling()


def draw(weights: Tensor, generator: Generator) -> Tensor:
    """A token with a probability proportional to its weight, int64 [1]. weights: [vocab], not all 0."""
    return torch.multinomial(weights, 1, generator=generator)


def accept(target: Tensor, drafted: Tensor, drafts: Tensor, generator: Generator) -> tuple[int, int]:
    """How many drafts are accepted, and the token that comes after them (arXiv 2211.17192, algorithm 1).

    A draft x, drawn from q, is accepted with probability min(1, p(x) / q(x)). After the first that is not, the next
    token is drawn from max(p - q, 0), normalised; after the last, from the backbone's p. So every token is distributed
    as the backbone's own, whatever the drafts. Greedily (p and q are 1 at one token each) this is: accept the drafts
    that are the backbone's choices, then take the backbone's choice.

    Example, greedy: drafts E X G where the backbone says E F G H: 1 accepted, then F.

    Args:
        target: p, the backbone's distribution at each draft and after the last one, [drafts + 1, vocab].
        drafted: q, what each draft was drawn from, [drafts, vocab].
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
        if not rest.any():  # p = q but for rounding, which is all that the draft was rejected for
            rest = target[accepted]
    return accepted, int(draw(rest, generator))
