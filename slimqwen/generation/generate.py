"""The command `slimqwen generate`: continue a prompt, and measure speed and acceptance."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from slimqwen.model.model import MtpCausalLM, load

COMPARED_ROUNDS = 3  # after the run whose text is shown, which serves as the warm-up
MEASUREMENTS = (  # fields that GenerationResult has in common with `speculative.Generation`
    *("tokens", "stopped", "verifications", "tokens_per_verification", "proposed_by_depth", "accepted_by_depth"),
    *("cumulative_acceptance", "conditional_acceptance", "prompt_seconds", "seconds", "tokens_per_second"),
)


class Comparison(BaseModel):
    """Speculative and plain decoding of the same prompt, alternating in one process; medians over the rounds.

    identical: whether the tokens are the same; None when sampling, where only their distribution is the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rounds: int
    speculative_tokens_per_second: float
    plain_tokens_per_second: float
    speedup: float
    identical: bool | None


class GenerationResult(BaseModel):
    """The text and its measurements, as printed by `--json`; the fields are those of `speculative.Generation`."""

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


@dataclass(frozen=True)
class Decoding:
    """The settings of decoding.

    draft: tokens that the MTP module drafts per verification; None: DEFAULT_DRAFT where there is one, else 0.
    max_new_tokens: the most to generate. seed: of the random numbers of sampling.
    """

    draft: int | None = None
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    seed: int = 0


def generate(
    folder: Path,
    prompt: str,
    decoding: Decoding,
    *,
    device: str = "auto",
    dtype: str = "auto",
    compare: bool = False,
    write: Callable[[str], None] | None = None,
) -> GenerationResult:
    """Continue a prompt with a checkpoint.

    Args:
        compare: also decode plainly, and report the speed-up of drafting.
        write: called with each piece of text as it is generated.
    Raises:
        UserError: for drafts without an MTP module; for a prompt that is empty or longer than the context.
        StageFailed: logits that are not finite.
    """
    tokenizer = load_tokenizer(folder)
    ids = _encode(tokenizer, prompt)
    torch_device = resolve_device(device)
    model = load(folder, resolve_dtype(dtype, torch_device), torch_device)
    _check_ids(ids, model, folder)
    draft = _choose_draft(model, folder, decoding.draft, compare)
    tokens = torch.tensor(ids, dtype=torch.long, device=torch_device)
    ends = _end_of_text(model.backbone.generation_config, tokenizer)
    text = _TextStream(tokenizer, write)

    sampling = decoding.sampling
    decode = partial(
        speculate,
        model,
        tokens,
        max_new_tokens=decoding.max_new_tokens,
        sampling=sampling,
        seed=decoding.seed,
        end_of_text=ends,
    )
    made = decode(draft=draft, emit=text.add)
    comparison = None
    if compare and made.verifications:
        rounds = [(decode(draft=draft), decode(draft=0)) for _ in range(COMPARED_ROUNDS)]
        comparison = _compare(rounds, sampling)
    return GenerationResult(
        checkpoint=str(folder),
        has_mtp=model.mtp is not None,
        draft=draft,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=decoding.seed,
        prompt_tokens=len(ids),
        text="".join(text.pieces),
        comparison=comparison,
        **{name: getattr(made, name) for name in MEASUREMENTS},
    )


def _check_ids(ids: list[int], model: MtpCausalLM, folder: Path) -> None:
    if max(ids, default=0) >= len(model.head):
        raise UserError(
            f"{folder}: the prompt has token {max(ids)} and the model only {len(model.head)} tokens: use the tokenizer that "
            "belongs to the checkpoint."
        )


def _choose_draft(model: MtpCausalLM, folder: Path, draft: int | None, compare: bool) -> int:
    """Return the number of drafts, by default DEFAULT_DRAFT with an MTP module. Raises UserError for drafts without one."""
    if draft is None:
        draft = DEFAULT_DRAFT if model.mtp is not None else 0
    elif draft > 0 and model.mtp is None:
        raise UserError(f"{folder} has no MTP module to draft with: leave out --draft, or give a checkpoint with MTP.")
    if compare and draft == 0:
        raise UserError(
            "--compare compares drafting with plain decoding: it requires an MTP module and a --draft above 0."
        )
    return draft


class _TextStream:
    """A decoder of tokens to text, piece by piece; `pieces` collects them, and `write` is called with each."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, write: Callable[[str], None] | None) -> None:
        self.pieces: list[str] = []
        self._tokenizer = tokenizer.backend_tokenizer
        self._write = write
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, tokens: list[int]) -> None:
        """Decode further tokens."""
        for token in tokens:
            piece = self._stream.step(self._tokenizer, token)
            if piece is not None:  # None: the token ends within a character
                self.pieces.append(piece)
                if self._write is not None:
                    self._write(piece)


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8 text: check its encoding.") from None
    ids: list[int] = tokenizer.encode(prompt)
    return ids


def _end_of_text(config: GenerationConfig, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Return the end-of-text ids of generation_config.json, or else of the tokenizer; may be empty."""
    ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {ends}


def _compare(rounds: list[tuple[Generation, Generation]], sampling: Sampling) -> Comparison | None:
    """Compare the speeds of (speculative, plain) rounds. The speed-up is the median per round, since speed drifts."""
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
    "end_of_text": "ended at end-of-text",
    "max_new_tokens": "cut at --max-new-tokens",
    "context": "cut at the end of the model's context",
}


def describe(result: GenerationResult) -> str:
    """Describe the measurements in a few lines."""
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
            ("accepted if all before were (conditional)", result.conditional_acceptance),
        ):
            lines.append(f"{title:<44}" + "".join(f"{share:>8.1%}" for share in shares))
    if result.comparison is not None:
        compared = result.comparison
        same = {
            True: "the tokens are identical",
            False: "the tokens DIFFER",
            None: "sampled, so the tokens may differ",
        }
        lines.append(
            f"{compared.rounds} alternating rounds: drafting {compared.speculative_tokens_per_second:.1f} tokens/s, plain "
            f"{compared.plain_tokens_per_second:.1f}: {compared.speedup:.2f} times as fast; {same[compared.identical]}"
        )
    return "\n".join(lines)
