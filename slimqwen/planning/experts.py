"""Which experts stay, and which absorb which of the others (method.md section 4)."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slimqwen.recipe import ExpertCompression

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["kept", "base", "absorbed", "dropped"]

UNTOUCHED: Mapping[ExpertCompression, Callable[[int], int]] = {
    ExpertCompression.PRUNE: lambda keep: keep,
    ExpertCompression.MERGE: lambda keep: 0,
    ExpertCompression.PARTIAL: lambda keep: keep // 2,
}
"""How many of the experts kept stay as they are; the others are bases."""


class ExpertGroup(BaseModel):
    """One expert of the result: each of its weight tensors is the sum over `members` of weight x the member's tensor.

    The router keeps `base`'s row.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: int = Field(ge=0, description="The source expert whose router row stays.")
    members: list[int] = Field(description="Source experts: the base, then those it absorbs in ascending order.")
    weights: list[float] = Field(description="Each member's share, in the order of `members`; they sum to 1.")

    @model_validator(mode="after")
    def _is_a_weighted_mean(self) -> "ExpertGroup":
        if self.members[:1] != [self.base] or len(set(self.members)) != len(self.members) or min(self.members) < 0:
            raise ValueError(f"members must be distinct experts, the base {self.base} first, not {self.members}")
        if len(self.weights) != len(self.members) or not math.isclose(math.fsum(self.weights), 1.0, abs_tol=1e-9):
            raise ValueError(f"one weight per member, summing to 1, is needed for base {self.base}, not {self.weights}")
        return self


def group_experts(
    compression: ExpertCompression,
    importance: "Tensor",
    similarity: "Tensor | None",
    keep: int,
    protected: Collection[int] = (),
) -> list[ExpertGroup]:
    """Return the `keep` experts of one MoE block's result, in ascending order of base.

    Ranked by `importance` `[experts]` (not negative), N = `keep`. Those `protected` rank before all others and stay as they are,
    as far as there is room for them:

    - 'prune': the top N stay as they are, the others are dropped.
    - 'merge': the top N are bases.
    - 'partial': the top floor(N/2) stay as they are, the next N - floor(N/2) are bases.

    Every expert below the top N joins the base most similar to it by `similarity` `[experts, experts]` (unused by
    'prune'), never an expert that stays as it is. Member i of a group weighs I_i / sum of I over the group; where all
    of these are 0 the base weighs 1 and the others 0. On a tie of importance the lower expert ranks first; on a tie of
    similarity the more important base absorbs.

    Example: importance [3, 1, 5, 2], keep 2, partial: expert 2 stays as it is, 0 is the base, 1 and 3 join it:
    (base 0, members 0 1 3, weights 3/6 1/6 2/6) and (base 2, alone, weight 1).
    """
    scores: list[float] = importance.tolist()
    assert 1 <= keep <= len(scores) and min(scores) >= 0
    order = sorted(range(len(scores)), key=lambda expert: -scores[expert])  # stable: the lower expert wins a tie
    ranked = sorted(order, key=lambda expert: expert not in protected)
    untouched = max(UNTOUCHED[compression](keep), min(len(protected), keep))
    bases, others = ranked[untouched:keep], ranked[keep:]

    members = {expert: [expert] for expert in sorted(ranked[:keep])}
    if bases and others:
        assert similarity is not None
        for expert in sorted(others):
            cosines: list[float] = similarity[expert].tolist()
            members[max(bases, key=cosines.__getitem__)].append(expert)  # the first of equals: the most important base
    return [
        ExpertGroup(base=base, members=group, weights=_shares([scores[expert] for expert in group]))
        for base, group in members.items()
    ]


def expert_roles(groups: Sequence[ExpertGroup], num_experts: int) -> list[Role]:
    """Return what became of each of the `num_experts` source experts.

    'kept': its weights are unchanged; 'base': others were averaged into it; 'absorbed': it was averaged into a base;
    'dropped': in no group. A base that absorbed no other expert is 'kept': its weights are unchanged.
    """
    roles: list[Role] = ["dropped"] * num_experts
    for group in groups:
        for member in group.members:
            roles[member] = "absorbed"
        roles[group.base] = "base" if len(group.members) > 1 else "kept"
    return roles


def _shares(scores: list[float]) -> list[float]:
    """Divide `scores` by their sum; all to the first where the sum is 0. One score alone gets exactly 1.0."""
    total = math.fsum(scores)
    if total == 0:
        return [1.0] + [0.0] * (len(scores) - 1)
    return [score / total for score in scores]
