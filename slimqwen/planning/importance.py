"""Importance and similarity: one pure function per criterion, from calibration sums to scores.

Each function is entered under the criterion's name. Its parameters are named after what it takes, which `planning/choose.py`
looks up:

- of an expert criterion the sums of its block (`Statistics`: `experts/{block}/NAME`), `tokens`, the number of tokens that the
  block saw, and `router_rows`, the router's weight;
- of a width criterion the sums, weights and counts of `choose.channel_measurements`.

Inputs are sums and counts over all calibration tokens, in float64 on the CPU: each function divides, once. Where
sources are weighted, counts need not be whole.
Nothing divides by zero: what was never seen scores 0, and a zero vector has similarity 0 to everything.
Sections are method.md's; SlimQwen is arXiv 2605.08738.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slimqwen.core.registry import Registry
from slimqwen.recipe import ExpertImportance, ExpertSimilarity, WidthCriterion

WIDTH: Registry[WidthCriterion, Callable[..., Tensor]] = Registry(WidthCriterion)
EXPERT_IMPORTANCE: Registry[ExpertImportance, Callable[..., Tensor]] = Registry(ExpertImportance)
EXPERT_SIMILARITY: Registry[ExpertSimilarity, Callable[..., Tensor]] = Registry(ExpertSimilarity)


@WIDTH.entry(WidthCriterion.NORM_ACTIVATION, WidthCriterion.ROTATION)
def norm_activation(abs_sums: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    """Return the importance of each residual channel, `[hidden]`: the mean over norms of the mean size of the norm's output.

    score_k = 1/n_norms * sum over norms of (sum over tokens |RMSNorm(x)_k|) / tokens      (SlimQwen, section 3)

    `abs_sums[n]`, `[hidden]`, and `counts[n]`, tokens, belong to the n-th RMSNorm; its output includes its gain.
    Every norm weighs the same, however many tokens it saw. Of a rotation these are the scores before it.
    """
    means = [abs_sum / tokens for abs_sum, tokens in zip(abs_sums, counts, strict=True)]
    return torch.stack(means).mean(dim=0)


@WIDTH.entry(WidthCriterion.WEIGHT_MAGNITUDE)
def weight_magnitude(square_sums: Sequence[Tensor]) -> Tensor:
    """Return the importance of each residual channel, `[hidden]`: its mean share of the matrices' squared weights; sums to 1.

    `square_sums[n]`, `[hidden]`: sums of w^2 over the other side of the n-th matrix that reads or writes the channels.
    Every matrix weighs the same. No criterion of the paper: what width pruning without data would look at.
    """
    return torch.stack([sums / _nonzero(sums.sum()) for sums in square_sums]).mean(dim=0)


@WIDTH.entry(WidthCriterion.RANDOM)
def random_scores(hidden_sums: Tensor) -> Tensor:
    """Return random numbers for the channels, `[hidden]`, to compare the other criteria with.

    `hidden_sums`, `[layers + 1, hidden]`, seed them: other calibration text draws other numbers.
    """
    seed = int.from_bytes(hashlib.sha256(hidden_sums.numpy().tobytes()).digest()[:7])
    return torch.rand(hidden_sums.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@EXPERT_IMPORTANCE.entry(ExpertImportance.FREQUENCY)
def frequency(assignments: Tensor, tokens: float) -> Tensor:
    """Return the importance of each expert, `[experts]`: the share of tokens routed to it; sums to top-k.

    score_i = E_x[1(i in A(x))] = assignments_i / tokens      (SlimQwen, section 4)
    """
    return assignments / tokens


@EXPERT_IMPORTANCE.entry(ExpertImportance.SOFT_LOGITS)
def soft_logits(gate_sums: Tensor, tokens: float) -> Tensor:
    """Return the importance of each expert, `[experts]`: its mean gate weight over ALL tokens, 0 where not selected; sums to 1.

    score_i = E_x[1(i in A(x)) z_i / sum_{j in A(x)} z_j] = gate_sums_i / tokens      (SlimQwen, section 4)

    `gate_sums` are sums of the gate weights after renormalisation over the selected experts.
    """
    return gate_sums / tokens


@EXPERT_IMPORTANCE.entry(ExpertImportance.REAP)
def reap(gated_norm_sums: Tensor, assignments: Tensor) -> Tensor:
    """Return the importance of each expert, `[experts]`: its mean gated output norm over the tokens ROUTED to it.

    score_i = (sum over tokens routed to i of z_i ||E_i(x)||_2) / assignments_i      (REAP, 2510.13999; section 4)

    An expert never routed to scores 0.
    """
    return gated_norm_sums / _nonzero(assignments)


@EXPERT_IMPORTANCE.entry(ExpertImportance.OUTPUT_NORM)
def output_norm(gated_norm_sums: Tensor, tokens: float) -> Tensor:
    """Return the importance of each expert, `[experts]`: what it adds to the stream, the mean gated output norm over ALL tokens.

    score_i = E_x[1(i in A(x)) z_i ||E_i(x)||_2] = gated_norm_sums_i / tokens: REAP times the share of tokens routed to the expert, or
    soft_logits with each gate times what it lets through (ours).
    """
    return gated_norm_sums / tokens


def mean_output_norm(gated_norm_sums: Tensor, gate_sums: Tensor) -> Tensor:
    """Return how large each expert's output is, `[experts]`: the mean of ||E_i(x)||_2 over its tokens, weighted by its gate.

    (sum over tokens routed to i of z_i ||E_i(x)||_2) / (sum of z_i). An expert never routed to has 0.
    """
    return gated_norm_sums / _nonzero(gate_sums)


def outliers(sizes: Tensor, times: float) -> list[int]:
    """Return which of `sizes` `[n]` are more than `times` their median, of those that are not 0; ascending.

    Example: of 1, 2, 0, 30 the median without the 0 is 2, and 30 is more than 5 times it: [3].
    """
    seen = sizes[sizes > 0]
    return [] if len(seen) == 0 else (sizes > times * seen.median()).nonzero()[:, 0].tolist()


def similarity(hidden_sums: Tensor) -> Tensor:
    """Return how little each layer turns the mean hidden state, `[layers]`: c_l = cos(a_{l-1}, a_l)      (SlimQwen, section 2).

    `hidden_sums`, `[layers + 1, hidden]`: row l is the sum over tokens of the hidden state before layer l, row l + 1
    of the one after it. The cosine of two sums is the cosine of the two means.
    """
    directions = _directions(hidden_sums)
    return (directions[:-1] * directions[1:]).sum(dim=-1).clamp(-1.0, 1.0)


def block_influence(cosine_sums: Tensor, tokens: float) -> Tensor:
    """Return how much each layer turns a token's hidden state, `[layers]`      (ShortGPT, 2403.03853; section 2).

    BI_l = 1 - mean over tokens of cos(h_{l-1,t}, h_{l,t}) = 1 - cosine_sums_l / tokens; 0 is a layer that does nothing.
    """
    return 1.0 - cosine_sums / tokens


@EXPERT_SIMILARITY.entry(ExpertSimilarity.ROUTER_LOGITS)
def router_logits_similarity(logit_gram: Tensor) -> Tensor:
    """Return the cosine, `[experts, experts]`, of the experts' router logits seen as vectors over the calibration tokens.

    cos_ij = gram_ij / sqrt(gram_ii gram_jj), gram_ij = sum over tokens of logit_i logit_j      (SlimQwen, section 4)
    """
    lengths = _nonzero(logit_gram.diagonal().sqrt())
    return (logit_gram / lengths[:, None] / lengths[None, :]).clamp(-1.0, 1.0)


@EXPERT_SIMILARITY.entry(ExpertSimilarity.ROUTER_WEIGHTS)
def router_weights_similarity(router_rows: Tensor) -> Tensor:
    """Return the cosine, `[experts, experts]`, of the router's rows, `[experts, hidden]`      (SlimQwen, section 4)."""
    directions = _directions(router_rows)
    return (directions @ directions.T).clamp(-1.0, 1.0)


@EXPERT_SIMILARITY.entry(ExpertSimilarity.EXPERT_OUTPUT)
def expert_output_similarity(output_sums: Tensor, assignments: Tensor) -> Tensor:
    """Return the cosine, `[experts, experts]`, of the experts' mean outputs on the tokens routed to them      (section 4; ours).

    `output_sums`, `[experts, hidden]`: the sum of E_i(x) (not gated) over the `assignments_i` tokens routed to i.
    An expert never routed to has no direction: similarity 0 to every expert, itself included.
    """
    directions = _directions(output_sums / _nonzero(assignments)[:, None])
    return (directions @ directions.T).clamp(-1.0, 1.0)


def _directions(vectors: Tensor) -> Tensor:
    """Scale `vectors`, `[n, hidden]`, to length 1; a zero vector stays zero."""
    return vectors / _nonzero(vectors.norm(dim=-1, keepdim=True))


def _nonzero(divisors: Tensor) -> Tensor:
    """Return `divisors` with 1 for 0: what is divided by them is zero there, and 0 / 1 is the 0 we want."""
    return divisors.where(divisors > 0, 1.0)
