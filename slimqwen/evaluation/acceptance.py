"""MTP acceptance: the share of drafts that equal the backbone's own greedy continuation."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from slimqwen.core.errors import UserError
from slimqwen.data.packed import PackedTokens
from slimqwen.model.model import MtpCausalLM


def heldout_prompts(tokens: Path, prompts: int, prompt_tokens: int) -> Tensor:
    """Cut evenly spaced windows of the held-out stream, int64 [prompts, prompt_tokens]. Raises UserError if it is too short."""
    packed = PackedTokens(tokens / "heldout")
    starts = packed.total_tokens - prompt_tokens + 1
    if starts < 1:
        raise UserError(
            f"{packed.prefix}.bin has {packed.total_tokens} tokens, fewer than the {prompt_tokens} of one prompt: "
            "add held-out text, or in a recipe lower evaluation.acceptance.prompt_tokens."
        )
    first = [i * starts // prompts for i in range(prompts)]
    return torch.stack([torch.from_numpy(packed.slice(start, start + prompt_tokens)) for start in first])


@torch.inference_mode()
def continue_greedily(backbone: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Tensor:
    """Continue prompts [batch, prompt] with the backbone's most likely tokens, to [batch, prompt + new_tokens].

    End-of-text is not treated specially: every row is continued to its full length.
    """
    # Replaced, not overridden by arguments: otherwise generate() would use the repetition penalty or stop tokens of the
    # checkpoint's generation_config.json, and the continuation would not be the most likely one.
    backbone.generation_config = GenerationConfig()
    return backbone.generate(prompts, max_new_tokens=new_tokens, do_sample=False, use_cache=True)


@torch.inference_mode()
def accepted_drafts(model: MtpCausalLM, sequences: Tensor, prompt_tokens: int, depth: int) -> Tensor:
    """Find where the first k + 1 drafts are all accepted, bool [batch, new_tokens - depth, depth]; acc_k is the mean of [..., k].

    A draft is accepted if it is the token that the backbone generates greedily (method.md section 5, Table 4). At
    position i the backbone has read t_0 .. t_i and predicted t_{i+1}; then the MTP module, applied recursively to its own
    output (arXiv 2412.19437, equations 21-25), drafts

        m^0_i = mtp(h_i,       Emb(t_{i+1}))   ->  t_{i+2}
        m^k_i = mtp(m^{k-1}_i, Emb(t_{i+k+1})) ->  t_{i+k+2}

    where t_{i+k+1} is the draft of depth k - 1. `sequences` are greedy continuations already, so as long as all drafts
    were accepted the draft and the token in the sequence are the same, and after the first rejection later drafts are not
    counted. So one forward pass per depth over the whole sequences, with their own tokens as inputs, is exact.

    Example: prompt A B C, continuation D E F G H, depth 2. Only positions with t_{i+1} .. t_{i+3} in the continuation
    are counted, the same for every k:

        i                   2    3    4
        t_{i+1}             D    E    F     predicted by the backbone
        depth 0 drafts      E    X    G     for E F G: 2 of 3, acc_0 = 0.667
        depth 1 drafts      F    G    Y     for F G H: only i = 2, since at i = 3 depth 0 was rejected; acc_1 = 0.333

    A serving engine differs: beyond depth 0 it runs the module on the newest token alone, with the KV cache of depth 0.
    In the recursion above depth k attends to depth k's own inputs at all earlier positions. acc_0 is the same in both,
    deeper ones may differ.

    Args:
        model: with an MTP module.
        sequences: from `continue_greedily` of this model, [batch, prompt_tokens + new_tokens]; new_tokens > depth.
    """
    assert model.mtp is not None, "there is no MTP module to draft with"
    mtp, decoder = model.mtp, model.backbone.get_decoder()
    embeddings = decoder.embed_tokens(sequences)

    def draft(hidden: Tensor, k: int) -> Tensor:
        result: Tensor = mtp(hidden, embeddings[:, k + 1 :], decoder.rotary_emb)
        return result

    hidden = decoder(input_ids=sequences[:, :-1], use_cache=False).last_hidden_state
    return judge_drafts(hidden, draft, model.head, sequences, prompt_tokens, depth)


@torch.inference_mode()
def judge_drafts(
    hidden: Tensor,
    draft: Callable[[Tensor, int], Tensor],
    head: Tensor,
    sequences: Tensor,
    prompt_tokens: int,
    depth: int,
) -> Tensor:
    """Do what `accepted_drafts` does, with the backbone's hidden states of `sequences` and a function that runs the MTP module.

    Args:
        hidden: of all tokens but the last, [batch, length - 1, hidden].
        draft: returns the outputs of depth k from the hidden states before it, [batch, length - 1 - k, hidden].
        head: lm_head's weight, [vocab, hidden].
    """
    length = sequences.shape[1]
    first, end = prompt_tokens - 1, length - 1 - depth  # counted positions: first <= i < end
    assert first < end, f"{length - prompt_tokens} new tokens leave no position to draft {depth} tokens from"

    accepted = torch.ones_like(sequences[:, first:end], dtype=torch.bool)
    by_depth = []
    for k in range(depth):
        hidden = draft(hidden[:, : length - 1 - k], k)  # the positions that have a t_{i+k+1}
        # One sequence at a time, so that only [positions, vocab] logits exist, not those of the batch.
        drafts = torch.stack([(row @ head.T).argmax(-1) for row in hidden[:, first:end]])
        accepted = accepted & (drafts == sequences[:, first + k + 2 : end + k + 2])
        by_depth.append(accepted)
    return torch.stack(by_depth, dim=-1)
