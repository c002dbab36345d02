"""Transformers' `generate` in step on all ranks that share a model."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from slimqwen.model.patching import override


class FirstRanksScores(LogitsProcessor):
    """The first rank's scores of the next token, on every rank."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the first rank's `scores` [batch, vocab]. input_ids, [batch, length], are the same on every rank."""
        scores = scores.contiguous()
        dist.broadcast(scores, src=0)
        return scores


def generate_in_step(backbone: PreTrainedModel) -> None:
    """Let `backbone.generate` choose the first rank's tokens on every rank, which must all be given the same prompts.

    The ranks' own scores are equal to rounding only: where two tokens are as good as equally likely one rank could choose an end of
    text, and the others would wait for its next forward pass.
    """
    override(backbone, generate=partial(backbone.generate, logits_processor=LogitsProcessorList([FirstRanksScores()])))


@torch.no_grad()
def begin_forward_passes(model: torch.nn.Module, device: torch.device) -> None:
    """Run a sharded `MtpCausalLM` once, on two tokens: so FSDP knows which module is the whole, before parts are called alone.

    Afterwards what surrounds its layers, lm_head among it, is gathered and stays so.
    """
    model(torch.zeros(1, 2, dtype=torch.int64, device=device))
