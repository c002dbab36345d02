"""Load-balancing loss over the global batch (arXiv 2501.11873)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def expert_counts(indices: Tensor, mask: Tensor, num_experts: int) -> Tensor:
    """Count how often each expert was selected by the tokens that count; counts of micro-batches and ranks add up.

    Args:
        indices: [tokens, k] int64, the experts that each token was routed to.
        mask: [tokens] bool, True at real tokens.

    Returns:
        [num_experts] int64.
    """
    counts = torch.zeros(num_experts, dtype=torch.int64, device=indices.device)
    selected = mask[:, None].expand_as(indices).to(torch.int64)
    return counts.scatter_add_(0, indices.flatten(), selected.flatten())


def counts_by_portion(experts: Tensor, mask: Tensor, portions: Tensor, num_portions: int, num_experts: int) -> Tensor:
    """Count what `expert_counts` does, of all blocks at once and apart for portions of rows.

    Args:
        experts: [blocks, tokens, k] int64, the experts that each token was routed to; its rows are equally long, one after another.
        mask: [tokens] bool, True at real tokens.
        portions: [rows] int64, the portion of each row, from 0.

    Returns:
        [num_portions, blocks, num_experts] int64.
    """
    blocks, _, k = experts.shape
    rows = len(portions)
    first = portions * blocks + torch.arange(blocks, device=portions.device)[:, None]  # [blocks, rows]
    places = experts.reshape(blocks, rows, -1) + first[..., None] * num_experts
    selected = mask.view(rows, -1, 1).expand(rows, -1, k).reshape(1, rows, -1).expand_as(places)
    counts = torch.zeros(num_portions * blocks * num_experts, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, places.flatten(), selected.to(torch.int64).flatten())
    return counts.view(num_portions, blocks, num_experts)


def load_balancing_loss(
    router_logits: Sequence[Tensor],
    mask: Tensor | None,
    counts: Sequence[Tensor],
    global_tokens: int,
    scores: Literal["softmax", "sigmoid"] = "softmax",
) -> Tensor:
    """Compute a micro-batch's share of the load-balancing loss of the global batch, a float32 scalar; without waiting for the device.

        loss = mean over blocks of  E * sum_i f_i P_i
        f_i  = counts_i / sum(counts)                        the share of all assignments that expert i received
        P_i  = sum over this micro-batch's tokens of p_i / global_tokens
        p_i  = softmax_i, or sigmoid_i / sum_j sigmoid_j where the router scores by sigmoid (DeepSeek-V3, 2412.19437, eq. 19)

    f carries no gradient and is the same everywhere (or the same for a row, wherever it is computed); P is a sum. So what the micro-batches and ranks return adds up to
    the loss of the global batch, and any cut of the batch gives the same gradient. Because f sums to 1, a balanced
    router has a loss of exactly 1. Transformers' `load_balancing_loss_func` divides the assignments by tokens: its f
    sums to k = num_experts_per_tok and its balanced router has k, so the same coefficient weighs k times less here.

    Two experts, k = 1, tokens routed with softmax (0.75, 0.25), (0.75, 0.25), (0.25, 0.75):
    counts = (2, 1), f = (2/3, 1/3), P = (1.75, 1.25) / 3, loss = 2 * (2/3 * 1.75/3 + 1/3 * 1.25/3) = 1.0556.

    Args:
        router_logits: one [tokens, experts] tensor per MoE block, before softmax, with gradient.
        mask: [tokens] bool, True at real tokens; None where all are.
        counts: one [experts] tensor per MoE block: `expert_counts` summed over micro-batches and ranks. Or [rows, experts], where the
            tokens are so many rows of equal length, each with the counts that its probabilities meet.
        global_tokens: real tokens of the global batch.
        scores: how the family's routers turn logits into scores (`Family.router_scores`).
    """
    logits = torch.stack(list(router_logits))  # of all blocks at once: a GPU has few kernels to start
    exact = _zero_padding(logits, mask).to(torch.promote_types(logits.dtype, torch.float32))
    if scores == "softmax":
        probs = exact.softmax(dim=-1)
    else:
        probs = exact.sigmoid() / exact.sigmoid().sum(dim=-1, keepdim=True)
    num_experts = logits.shape[-1]
    by_row = torch.stack([block_counts.view(-1, num_experts) for block_counts in counts])  # [blocks, rows, experts]
    fraction = by_row.to(probs.dtype) / by_row.sum(-1, keepdim=True)
    sums = _zero_padding(probs, mask).unflatten(1, (by_row.shape[1], -1)).sum(2)
    losses = num_experts * (fraction * sums).sum((1, 2)) / global_tokens
    return losses.mean()


def _zero_padding(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return `values` [..., tokens, n] with zeros, not what stands there times zero, where `mask` [tokens] is False."""
    return values if mask is None else torch.where(mask[:, None], values, 0)
