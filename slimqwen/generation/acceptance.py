"""Acceptance of drafts in actual speculative decoding, over several prompts."""

import torch
from torch import Tensor

from slimqwen.core.progress import Progress
from slimqwen.generation.speculative import Agree, own_choice, speculate_together
from slimqwen.model.model import MtpCausalLM


@torch.inference_mode()
def speculative_acceptance(
    model: MtpCausalLM, prompts: Tensor, *, draft: int, new_tokens: int, title: str, agree: Agree = own_choice
) -> dict[str, float]:
    """Decode each prompt greedily with `draft` drafts at a time, and measure how many are accepted.

    Args:
        prompts: int64 [prompts, prompt], on the model's device.
        agree: as in `speculate_together`, where several processes share the model.
    Returns:
        draft_k: share of verifications that accepted the first k + 1 drafts, of those with at least as many drafts; and
        tokens_per_verification: tokens per forward pass of the backbone, 1 without drafting.
    """
    accepted, proposed, tokens, verifications = [0] * draft, [0] * draft, 0, 0
    with Progress(title, total=len(prompts) * new_tokens, unit="tokens") as progress:
        for prompt in prompts:
            made = speculate_together(model, prompt, draft=draft, max_new_tokens=new_tokens, agree=agree)
            accepted = [a + b for a, b in zip(accepted, made.accepted_by_depth, strict=True)]
            proposed = [a + b for a, b in zip(proposed, made.proposed_by_depth, strict=True)]
            tokens += len(made.tokens) - 1  # the first is from the prompt's own forward pass
            verifications += made.verifications
            progress.advance(len(made.tokens))
    shares = {f"draft_{k}": a / p for k, (a, p) in enumerate(zip(accepted, proposed, strict=True)) if p}
    return shares | {"tokens_per_verification": tokens / max(verifications, 1)}
