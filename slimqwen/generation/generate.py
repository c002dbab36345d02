"""What `slimqwen generate` does: a prompt in, text and the numbers of its making out."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, PreTrainedTokenizerFast

from slimqwen.core.errors import UserError
from slimqwen.data.tokenizer import load_tokenizer
from slimqwen.generation import DEFAULT_DRAFT
from slimqwen.generation.sampling import GREEDY, Sampling
from slimqwen.generation.speculative import Generation, speculate
from slimqwen.model.device import resolve_device, resolve_dtype
from slimqwen.model.model import load

COMPARED_ROUNDS = 3  # after the run whose text is shown, which warms up


class Comparison(BaseModel):
    """Speculative and plain decoding of the same prompt, in turns in one process; medians over the rounds.

    identical: whether the tokens are the same; None when sampling, where only their distribution is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rounds: int
    speculative_tokens_per_second: float
    plain_tokens_per_second: float
    speedup: float
    identical: bool | None


class GenerationResult(BaseModel):
    """The text and the numbers, as `--json` prints them; the words are those of `speculative.Generation`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str
    has_mtp: bool
    draft: int
    temperature: float
    top_p: float
    seed: int
    prompt_tokens: int
    text: str
    tokens: list[int]
    stopped: Literal["end_of_text", "max_new_tokens", "context"]
    verifications: int
    tokens_per_verification: float | None
    proposed_by_depth: list[int]
    accepted_by_depth: list[int]
    cumulative_acceptance: list[float]
    conditional_acceptance: list[float]
    prompt_seconds: float
    seconds: float
    tokens_per_second: float | None
    comparison: Comparison | None


def generate(
    folder: Path,
    prompt: str,
    *,
    draft: int | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    compare: bool = False,
    write: Callable[[str], None] | None = None,
) -> GenerationResult:
    """Continue a prompt with a checkpoint.

    Args:
        draft: tokens that the MTP module drafts per verification; None: 3 where there is one, else 0.
        compare: also decode plainly, and say how much faster drafting is.
        write: is given the text piece by piece as it comes.
    Raises:
        UserError: drafts asked of a checkpoint without MTP; a prompt that is empty or longer than the context.
        StageFailed: logits that are not finite.
    """
    tokenizer = load_tokenizer(folder)
    ids = _encode(tokenizer, prompt)
    torch_device = resolve_device(device)
    model = load(folder, resolve_dtype(dtype, torch_device), torch_device)
    if max(ids, default=0) >= len(model.head):
        raise UserError(
            f"{folder}: the tokenizer makes token {max(ids)} of the prompt, the model's vocabulary has {len(model.head)}: "
            "give the checkpoint its own tokenizer."
        )
    if draft is None:
        draft = DEFAULT_DRAFT if model.mtp is not None else 0
    elif draft > 0 and model.mtp is None:
        raise UserError(f"{folder} has no MTP module to draft with: leave out --draft, or give a checkpoint with MTP.")
    if compare and draft == 0:
        raise UserError(
            "--compare compares drafting with plain decoding: it takes an MTP module and a --draft above 0."
        )

    tokens = torch.tensor(ids, dtype=torch.long, device=torch_device)
    ends = _end_of_text(model.backbone.generation_config, tokenizer)
    stream = DecodeStream(skip_special_tokens=True)
    pieces: list[str] = []

    def show(new: list[int]) -> None:
        for token in new:
            piece = stream.step(tokenizer.backend_tokenizer, token)
            if piece is not None:  # None: the token ends within a character
                pieces.append(piece)
                if write is not None:
                    write(piece)

    def decode(drafts: int, emit: Callable[[list[int]], None] | None = None) -> Generation:
        return speculate(
            model,
            tokens,
            draft=drafts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            end_of_text=ends,
            emit=emit,
        )

    made = decode(draft, show)
    comparison = None
    if compare and made.verifications:
        comparison = _compare([(decode(draft), decode(0)) for _ in range(COMPARED_ROUNDS)], sampling)
    return GenerationResult(
        checkpoint=str(folder),
        has_mtp=model.mtp is not None,
        draft=draft,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        prompt_tokens=len(ids),
        text="".join(pieces),
        tokens=made.tokens,
        stopped=made.stopped,
        verifications=made.verifications,
        tokens_per_verification=made.tokens_per_verification,
        proposed_by_depth=made.proposed_by_depth,
        accepted_by_depth=made.accepted_by_depth,
        cumulative_acceptance=made.cumulative_acceptance,
        conditional_acceptance=made.conditional_acceptance,
        prompt_seconds=made.prompt_seconds,
        seconds=made.seconds,
        tokens_per_second=made.tokens_per_second,
        comparison=comparison,
    )


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8 text: check its encoding.") from None
    ids: list[int] = tokenizer.encode(prompt)
    return ids


def _end_of_text(config: GenerationConfig, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """What the checkpoint's generation_config.json stops at, or else the tokenizer's end-of-text; may be empty."""
    ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {ends}


def _compare(rounds: list[tuple[Generation, Generation]], sampling: Sampling) -> Comparison | None:
    """rounds: speculative and plain. The speed-up is the median of the rounds' own, since a machine's speed drifts."""
    speeds = [(s.tokens_per_second, p.tokens_per_second) for s, p in rounds]
    known = [(s, p) for s, p in speeds if s is not None and p is not None]
    if not known:
        return None
    return Comparison(
        rounds=len(known),
        speculative_tokens_per_second=median(s for s, _ in known),
        plain_tokens_per_second=median(p for _, p in known),
        speedup=median(s / p for s, p in known),
        identical=all(s.tokens == p.tokens for s, p in rounds) if sampling.temperature == 0.0 else None,
    )


STOPPED = {
    "end_of_text": "ended by the model",
    "max_new_tokens": "cut at --max-new-tokens",
    "context": "cut at the end of the model's context",
}


def describe(result: GenerationResult) -> str:
    """The numbers in a few lines."""
    speed = "" if result.tokens_per_second is None else f", {result.tokens_per_second:.1f} tokens/s"
    count = len(result.tokens)
    lines = [
        f"{count:,} {'token' if count == 1 else 'tokens'} after a prompt of {result.prompt_tokens:,}, "
        f"{STOPPED[result.stopped]}{speed} (the prompt took {result.prompt_seconds:.2f} s)"
    ]
    if result.draft == 0:
        lines.append("plain decoding" + ("" if result.has_mtp else ": the checkpoint has no MTP module to draft with"))
    elif result.tokens_per_verification is not None:
        lines.append(
            f"drafts of {result.draft}, {result.verifications:,} verifications of {result.tokens_per_verification:.2f} tokens each"
        )
        names = "".join(f"{f'acc_{k}':>8}" for k in range(len(result.cumulative_acceptance)))
        lines.append(f"{'':<44}{names}")
        for title, shares in (
            ("accepted with all before (cumulative)", result.cumulative_acceptance),
            ("accepted where all before were (conditional)", result.conditional_acceptance),
        ):
            lines.append(f"{title:<44}" + "".join(f"{share:>8.1%}" for share in shares))
    if result.comparison is not None:
        compared = result.comparison
        same = {
            True: "the tokens are identical",
            False: "the tokens DIFFER",
            None: "sampled: the tokens need not agree",
        }
        lines.append(
            f"in turns, {compared.rounds} rounds: drafting {compared.speculative_tokens_per_second:.1f} tokens/s, plain "
            f"{compared.plain_tokens_per_second:.1f}: {compared.speedup:.2f} times as fast; {same[compared.identical]}"
        )
    return "\n".join(lines)
