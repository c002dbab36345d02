"""What a plan chose, in words: for whoever reads the terminal, and what deserves a warning."""

from collections import Counter
from collections.abc import Iterable, Iterator
from statistics import median
from typing import TYPE_CHECKING

from slimqwen.planning.experts import Role, expert_roles
from slimqwen.planning.norm_readers import strengths_in_words
from slimqwen.recipe import DepthCriterion

if TYPE_CHECKING:
    from slimqwen.planning.plan import Plan

# Block influence of a dropped layer over the median: the built-in teacher's last layer has 2.8, that of a pretrained model
# (SmolLM2-135M), without which its predictions are lost, 6.4.
FAR_ABOVE_LAYERS = 3.0


def choice_text(plan: "Plan") -> str:
    """Return a line for each axis that is cut: which layers go, how much of the stream stays, how many experts, and which are outliers."""
    return "\n".join([*_layers(plan), *_width(plan), *_experts(plan)])


def plan_warnings(plan: "Plan") -> Iterator[str]:
    """Yield warnings of what a plan drops although it stands out: layers with far more block influence than the median, outliers among experts."""
    influence = plan.scores.layer_block_influence
    for layer in _dropped_layers(plan):
        times = influence[layer] / max(median(influence), 1e-12)
        if times > FAR_ABOVE_LAYERS:
            better = (
                ""
                if plan.pruning.depth == DepthCriterion.MEASURED
                else " (pruning.depth: measured drops those that are missed least)"
            )
            yield (
                f"warning: the plan drops layer {layer}, whose block influence {influence[layer]:.3f} is {times:.1f} times the "
                f"median of all layers: keep it, or see what dropping it does before training{better}."
            )
    for block, experts in plan.outliers.items():
        kept = {group.base for group in plan.expert_groups[block] if len(group.members) == 1}
        lost = [expert for expert in experts if expert not in kept]
        if lost:
            yield (
                f"warning: the plan drops or merges {_named('expert', lost)} of {block}, whose outputs are far larger than those of its other "
                "experts: set pruning.experts.keep_outliers: true, or keep more experts."
            )


def _layers(plan: "Plan") -> Iterator[str]:
    dropped = _dropped_layers(plan)
    if dropped:
        influence = plan.scores.layer_block_influence
        said = ", ".join(f"{layer} ({influence[layer]:.3f})" for layer in dropped)
        yield (
            f"layers     {len(influence)} -> {len(plan.kept_layers)} by {plan.pruning.depth.in_words}; dropped, with their block influence: {said} "
            f"(median {median(influence):.3f})"
        )


def _width(plan: "Plan") -> Iterator[str]:
    kept = plan.target.hidden_size or 0
    if plan.basis is not None:
        share = sum(plan.scores.hidden[:kept])
        yield f"width      {len(plan.scores.hidden)} -> {kept} directions with {share:.1%} of the second moments"
        if plan.readers:
            yield f"           readers refitted, {strengths_in_words(plan.readers)}"
        if plan.readers and len(plan.sources) == 1:
            yield (
                f"           on one source of text ('{next(iter(plan.sources))}'): part of what that wins is not there on other text; "
                "where the model is for several, calibrate on a source of each (--tokens given several times, calibration.sources in a recipe)"
            )
    elif 0 < kept < len(plan.scores.hidden):
        yield f"width      {len(plan.scores.hidden)} -> {kept} channels by {plan.pruning.width.in_words}"


def _experts(plan: "Plan") -> Iterator[str]:
    if any(len(groups) < len(plan.scores.experts[block]) for block, groups in plan.expert_groups.items()):
        criteria = plan.pruning.experts
        roles = {
            block: expert_roles(groups, len(plan.scores.experts[block])) for block, groups in plan.expert_groups.items()
        }
        before, after = next((len(roles[block]), len(groups)) for block, groups in plan.expert_groups.items())
        yield f"experts    {before} -> {after} in each of {len(roles)} blocks by {criteria.importance.in_words}, {criteria.compression.in_words}"
        for block, found in roles.items():
            yield f"           {block}: {_roles_in_words(found)}"
    for block, experts in plan.outliers.items():
        yield f"outliers   {block}: {_named('expert', experts)}, outputs far larger than the others'"


def _roles_in_words(roles: list[Role]) -> str:
    """Return which experts did not stay as they are ("dropped 1, 4"); where most did not, how many of each."""
    counts = Counter(roles)
    gone: dict[Role, list[int]] = {
        role: [expert for expert, own in enumerate(roles) if own == role] for role in counts if role != "kept"
    }
    if sum(map(len, gone.values())) <= 16:
        return "; ".join(f"{role} {', '.join(map(str, experts))}" for role, experts in gone.items())
    return ", ".join(f"{count} {role}" for role, count in counts.items())


def _dropped_layers(plan: "Plan") -> list[int]:
    return [layer for layer in range(len(plan.scores.layer_block_influence)) if layer not in plan.kept_layers]


def _named(noun: str, numbers: Iterable[int]) -> str:
    """Return the noun with its numbers: "expert 3", "experts 3, 5"."""
    said = [str(number) for number in numbers]
    return f"{noun}{'s' if len(said) > 1 else ''} {', '.join(said)}"
