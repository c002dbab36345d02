"""MTP acceptance: how many tokens drafted in a row are what the backbone itself generates greedily."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from slimqwen.core.errors import UserError
from slimqwen.data.packed import PackedTokens
from slimqwen.model.model import MtpCausalLM


def heldout_prompts(tokens: Path, prompts: int, prompt_tokens: int) -> Tensor:
    """Evenly spaced windows of the held-out stream, int64 [prompts, prompt_tokens]. Raises UserError if it is shorter."""
    packed = PackedTokens(tokens / "heldout")
    starts = packed.total_tokens - prompt_tokens + 1
    if starts < 1:
        raise UserError(
            f"{packed.prefix}.bin has {packed.total_tokens} tokens, fewer than the {prompt_tokens} of one prompt: "
            "add held-out text, or in a recipe lower evaluation.acceptance_prompt_tokens."
        )
    first = [i * starts // prompts for i in range(prompts)]
    return torch.stack([torch.from_numpy(packed.slice(start, start + prompt_tokens)) for start in first])


@torch.inference_mode()
def continue_greedily(backbone: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Tensor:
    """The prompts [batch, prompt] with what the backbone finds most likely after them, [batch, prompt + new_tokens].

    End-of-text is a token like any other here: every row is continued to its full length.
    """
    # Replaced, not overridden: what generate() is not told it takes from the checkpoint's generation_config.json, whose
    # repetition penalty or stop tokens would make it something else than the backbone's most likely continuation.
    backbone.generation_config = GenerationConfig()
    return backbone.generate(prompts, max_new_tokens=new_tokens, do_sample=False, use_cache=True)


@torch.inference_mode()
def accepted_drafts(model: MtpCausalLM, sequences: Tensor, prompt_tokens: int, depth: int) -> Tensor:
    """Where the first k + 1 drafts are all accepted, bool [batch, new_tokens - depth, depth]; acc_k is the mean of [..., k].

    A draft is accepted if it is the token that the backbone generates greedily (method.md section 5, Table 4). At
    position i the backbone has read t_0 .. t_i and said t_{i+1}; then the MTP module, applied to its own output again
    and again (arXiv 2412.19437, equations 21-25), drafts

        m^0_i = mtp(h_i,       Emb(t_{i+1}))   ->  t_{i+2}
        m^k_i = mtp(m^{k-1}_i, Emb(t_{i+k+1})) ->  t_{i+k+2}

    where t_{i+k+1} is the draft of depth k - 1. `sequences` are greedy continuations already, so as long as all drafts
    were accepted the draft and the token in the sequence are the same; after the first rejection nothing counts. Hence
    one pass per depth over the whole sequences, with their own tokens as inputs, is exact.

    Example: prompt A B C, continuation D E F G H, depth 2. Positions that count have t_{i+1} .. t_{i+3} in the
    continuation, the same for every k:

        i                   2    3    4
        t_{i+1}             D    E    F     said by the backbone
        depth 0 drafts      E    X    G     for E F G: 2 of 3, acc_0 = 0.667
        depth 1 drafts      F    G    Y     for F G H: only i = 2, since at i = 3 depth 0 was rejected; acc_1 = 0.333

    How a serving engine differs: beyond depth 0 it runs the module on the newest token alone, with a KV cache of what
    depth 0 left there. In the recursion above depth k attends to depth k's own inputs at all earlier positions. acc_0
    is the same in both, deeper ones need not be.

    Args:
        model: with an MTP module.
        sequences: from `continue_greedily` of this model, [batch, prompt_tokens + new_tokens]; new_tokens > depth.
    """
    assert model.mtp is not None, "there is no MTP module to draft with"
    length = sequences.shape[1]
    first, end = prompt_tokens - 1, length - 1 - depth  # positions that count: first <= i < end
    assert first < end, f"{length - prompt_tokens} new tokens leave no position to draft {depth} tokens from"

    decoder = model.backbone.get_decoder()
    hidden = decoder(input_ids=sequences[:, :-1], use_cache=False).last_hidden_state
    embeddings = decoder.embed_tokens(sequences)
    accepted = torch.ones_like(sequences[:, first:end], dtype=torch.bool)
    by_depth = []
    for k in range(depth):
        positions = length - 1 - k  # those whose t_{i+k+1} exists
        hidden = model.mtp(hidden[:, :positions], embeddings[:, k + 1 :], decoder.rotary_emb)
        # One sequence at a time: [positions, vocab] logits, never those of the batch.
        drafts = torch.stack([(row @ model.head.T).argmax(-1) for row in hidden[:, first:end]])
        accepted = accepted & (drafts == sequences[:, first + k + 2 : end + k + 2])
        by_depth.append(accepted)
    return torch.stack(by_depth, dim=-1)
