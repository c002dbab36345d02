"""Self-speculative decoding: the MTP module drafts a few tokens, the backbone verifies them in one forward pass.

It is exact up to rounding: a forward pass of several tokens sums in another order than one of a single token, and
where two logits differ by less than that (below 1e-4 in float32, far more in bfloat16) the greedy choice can flip.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor
from transformers import DynamicCache

from slimqwen.core.errors import StageFailed, UserError
from slimqwen.generation.sampling import GREEDY, Sampling, accept, draw
from slimqwen.generation.state import CachedBackbone
from slimqwen.model.model import MtpCausalLM

Agree = Callable[[list[int]], list[int]]
"""Returns the choice of the process whose choices count, when each of several passes its own."""


def own_choice(choice: list[int]) -> list[int]:
    """Return the choice itself, of a process that decodes alone."""
    return choice


@dataclass(frozen=True)
class Generation:
    """Generated tokens and statistics. Lists by depth have one entry for each draft in a row, the first at index 0.

    tokens: the continuation; the last is an end-of-text token if `stopped` is "end_of_text". verifications: forward
    passes of the backbone after the prompt's. proposed_by_depth: verifications in which the MTP module drafted that
    far. reached_by_depth: those in which all earlier drafts were accepted. accepted_by_depth: those in which this one
    was accepted too. prompt_seconds: until the first token. seconds: from the first token to the last, including
    drafting and the MTP module's own pass over the prompt.
    """

    tokens: list[int]
    stopped: Literal["end_of_text", "max_new_tokens", "context"]
    verifications: int
    proposed_by_depth: list[int]
    reached_by_depth: list[int]
    accepted_by_depth: list[int]
    prompt_seconds: float
    seconds: float

    @property
    def cumulative_acceptance(self) -> list[float]:
        """acc_k: share of verifications that accepted the first k + 1 drafts, of those with at least as many drafts."""
        return _shares(self.accepted_by_depth, self.proposed_by_depth)

    @property
    def conditional_acceptance(self) -> list[float]:
        """Share of drafts accepted at depth k, of those whose earlier drafts were all accepted."""
        return _shares(self.accepted_by_depth, self.reached_by_depth)

    @property
    def tokens_per_verification(self) -> float | None:
        """Tokens per forward pass of the backbone, 1 in plain decoding; None where there was only the prompt's pass."""
        return (len(self.tokens) - 1) / self.verifications if self.verifications else None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None where there is no other."""
        return (len(self.tokens) - 1) / self.seconds if self.verifications else None


def _shares(counts: list[int], of: list[int]) -> list[float]:
    """Divide up to the first depth that never occurred."""
    return [count / total for count, total in zip(counts, of, strict=True) if total]


@torch.inference_mode()
def speculate(
    model: MtpCausalLM,
    prompt: Tensor,
    *,
    draft: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    end_of_text: Collection[int] = (),
    emit: Callable[[list[int]], None] | None = None,
) -> Generation:
    """Continue one prompt, with the same distribution, and greedily the same tokens, for every `draft`.

    Args:
        prompt: int64 [prompt], on the model's device.
        draft: tokens to draft before each verification; 0, also without an MTP module, is plain decoding.
        max_new_tokens: the most to generate; fewer where the context ends, or at end-of-text.
        seed: of the random numbers, unused at temperature 0.
        end_of_text: ids after which generation stops.
        emit: called with the new tokens as soon as they are final.
    Raises:
        UserError: for a prompt that is empty or leaves no room in the context; for drafts without an MTP module.
        StageFailed: logits that are not finite.
    """
    room = min(max_new_tokens, _context_left(model, prompt))
    if draft > 0 and model.mtp is None:
        raise UserError("this checkpoint has no MTP module to draft with: use a draft of 0, which is plain decoding.")
    rounds = _Rounds(model, draft, sampling, Generator(prompt.device).manual_seed(seed))
    return _decode(rounds, prompt, room, max_new_tokens, end_of_text, emit)


@torch.inference_mode()
def speculate_together(
    model: MtpCausalLM, prompt: Tensor, *, draft: int, max_new_tokens: int, agree: Agree
) -> Generation:
    """Continue one prompt greedily, as `speculate` does, on all processes that share the model at once.

    Their forward passes are common, and two processes may differ by rounding: where two logits are as good as equal, each would
    choose another token, accept another number of drafts, and wait for a forward pass that the others do not make.

    agree: called with the tokens that each verification leads to; what it returns is followed on every process.
    """
    room = min(max_new_tokens, _context_left(model, prompt))
    rounds = _Rounds(model, draft, GREEDY, Generator(prompt.device).manual_seed(0), agree)
    return _decode(rounds, prompt, room, max_new_tokens)


def _decode(
    rounds: "_Rounds",
    prompt: Tensor,
    room: int,
    max_new_tokens: int,
    end_of_text: Collection[int] = (),
    emit: Callable[[list[int]], None] | None = None,
) -> Generation:
    """Read the prompt and verify drafts until `room` tokens are made, or one of `end_of_text`."""
    tokens: list[int] = []
    started = time.perf_counter()
    new = rounds.read_prompt(prompt)
    first_token = time.perf_counter()
    while True:
        new = _up_to_end(new, end_of_text)
        tokens += new
        if emit is not None:
            emit(new)
        if new[-1] in end_of_text or len(tokens) == room:
            break
        new = rounds.verify(min(rounds.draft, room - len(tokens) - 1))  # the backbone always adds one token of its own
    ended = time.perf_counter()
    return Generation(
        tokens=tokens,
        stopped=_stop_reason(tokens, end_of_text, max_new_tokens),
        verifications=rounds.verifications,
        proposed_by_depth=rounds.proposed,
        reached_by_depth=rounds.reached,
        accepted_by_depth=rounds.accepted,
        prompt_seconds=first_token - started,
        seconds=ended - first_token,
    )


class _Rounds:
    """The rounds of drafting and verification for one prompt, and counts of the drafts by depth."""

    def __init__(
        self, model: MtpCausalLM, draft: int, sampling: Sampling, generator: Generator, agree: Agree = own_choice
    ) -> None:
        self.draft = draft
        self.verifications = 0
        self.proposed, self.reached, self.accepted = [0] * draft, [0] * draft, [0] * draft
        self._head = model.head
        self._sampling = sampling
        self._generator = generator
        self._drafter = Drafter(model, sampling, generator)
        self._backbone = CachedBackbone(model.backbone)
        self._uses_drafts = draft > 0
        self._agree = agree

    def read_prompt(self, prompt: Tensor) -> list[int]:
        """Read the prompt, int64 [prompt]. Returns the first new token."""
        self._hidden = self._backbone.read(prompt[None])
        logits = self._hidden[0, -1] @ self._head.T
        if not logits.isfinite().all():
            raise StageFailed("the model's logits after the prompt are not finite: its weights are broken.")
        new = self._agree([int(draw(self._sampling.probabilities(logits), self._generator))])
        self._following = torch.cat([prompt[1:], prompt.new_tensor(new)])
        return new

    def verify(self, depth: int) -> list[int]:
        """Draft and verify `depth` tokens. Returns the new tokens.

        With the tokens up to t_n chosen and those before t_n read, the MTP module drafts d_1 .. d_depth and the backbone
        reads t_n d_1 .. d_depth in one pass. The drafts accepted by `accept` and one more token from the backbone itself
        are the new tokens; the backbone's state after them is rolled back.
        """
        drafts, drafted = self._drafter.draft(self._hidden, self._following, depth)
        piece = torch.cat([self._following[-1:], drafts])[None]
        hidden = self._backbone.read_revocably(piece) if self._uses_drafts else self._backbone.read(piece)
        target = self._sampling.probabilities(hidden[0] @ self._head.T)
        accepted, own = accept(target, drafted, drafts, self._generator)
        new = self._agree([*drafts[:accepted].tolist(), own])
        accepted = len(new) - 1
        if self._uses_drafts:
            self._backbone.forget(depth - accepted)
        self._hidden = hidden[:, : accepted + 1]
        self._following = drafts.new_tensor(new)
        self._count(depth, accepted)
        return new

    def _count(self, depth: int, accepted: int) -> None:
        self.verifications += 1
        for k in range(depth):
            self.proposed[k] += 1
            self.reached[k] += k <= accepted
            self.accepted[k] += k < accepted


class Drafter:
    """The MTP module with its own KV cache, so that a draft costs one forward pass of one layer.

    The recursion is that of serving engines (vLLM, SGLang). The cache holds the module's keys and values for the
    backbone's own hidden states: entry i is of (h_i, t_{i+1}), from which depth 0 drafts t_{i+2}. Deeper drafts run only
    the newest token, with the module's own last output in place of h:

        m^0 = mtp(h_i, Emb(t_{i+1})),  m^k = mtp(m^{k-1}, Emb(d_k)) at position i + k  ->  d_{k+1}

    The entries of deeper drafts are dropped again: the next round computes these positions from the backbone's hidden
    states. acceptance.accepted_drafts differs from depth 1 on, where it attends to depth k's own outputs at all
    earlier positions; depth 0 is the same.
    """

    def __init__(self, model: MtpCausalLM, sampling: Sampling, generator: Generator) -> None:
        self._model = model
        self._sampling = sampling
        self._generator = generator
        self._cache = DynamicCache()

    def draft(self, hidden: Tensor, following: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the next `count` drafts, int64 [count], and the distributions they were drawn from, [count, vocab].

        hidden: the backbone's hidden states since the last call, [1, seq, hidden]; following: the token after
        each of them, int64 [seq].
        """
        head = self._model.head
        if count == 0:
            return following[:0], head.new_empty(0, len(head), dtype=torch.float32)
        mtp, decoder = self._model.mtp, self._model.backbone.get_decoder()
        assert mtp is not None, "there is no MTP module to draft with"
        drafts, drafted = [], []
        for _ in range(count):
            embeddings = decoder.embed_tokens(following)[None]
            hidden = mtp(hidden, embeddings, decoder.rotary_emb, past_key_values=self._cache)[:, -1:]
            drafted.append(self._sampling.probabilities(hidden[0, 0] @ head.T))
            following = draw(drafted[-1], self._generator)
            drafts.append(following)
        self._cache.crop(1 - count)
        return torch.cat(drafts), torch.stack(drafted)


def _context_left(model: MtpCausalLM, prompt: Tensor) -> int:
    context: int = model.backbone.get_decoder().config.max_position_embeddings
    if len(prompt) == 0:
        raise UserError("the prompt has no tokens: give at least one character to continue.")
    if len(prompt) >= context:
        raise UserError(
            f"the prompt has {len(prompt):,} tokens and the model a context of {context:,}: shorten the prompt to "
            f"fewer than {context:,} tokens."
        )
    return context - len(prompt)


def _up_to_end(new: list[int], end_of_text: Collection[int]) -> list[int]:
    ends = (i for i, token in enumerate(new) if token in end_of_text)
    return new[: next(ends, len(new)) + 1]


def _stop_reason(
    tokens: list[int], end_of_text: Collection[int], max_new_tokens: int
) -> Literal["end_of_text", "max_new_tokens", "context"]:
    if tokens[-1] in end_of_text:
        return "end_of_text"
    return "max_new_tokens" if len(tokens) == max_new_tokens else "context"
