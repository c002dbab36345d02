"""What was kept and why, axis by axis, in the words that each criterion has in `recipe/criteria.py`."""

from slimqwen.planning.plan import Plan
from slimqwen.recipe import DepthCriterion
from slimqwen.reporting.charts.choices import layer_scores, width_scores
from slimqwen.reporting.charts.heatmaps import expert_fates, expert_importance, merge_groups
from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.sections.amounts import percent
from slimqwen.reporting.sections.chart import Chart


def choices(run: Run) -> list[list[Chart]]:
    """Chart what was kept and why, axis by axis: the scores, from the plans that cut it."""
    where = [f", stage {number}" if len(run.plans) > 1 else "" for number in range(1, len(run.plans) + 1)]
    axes = [
        [chart for plan, stage in zip(run.plans, where, strict=True) for chart in charts_of_axis(plan, stage)]
        for charts_of_axis in (_layer_choice, _width_choice, _expert_choice)
    ]
    return [axis for axis in axes if axis]


def _layer_choice(plan: Plan, where: str) -> list[Chart]:
    scores = plan.scores
    if len(plan.kept_layers) == len(scores.layer_block_influence):
        return []
    criterion = plan.pruning.depth
    quantity = "cosine of input and output" if criterion == DepthCriterion.SIMILARITY else "block influence, 1 − cosine"
    values = scores.layer_similarity if criterion == DepthCriterion.SIMILARITY else scores.layer_block_influence
    return [Chart.of(f"Layers{where}", layer_scores(values, plan.kept_layers, quantity), criterion.outcome)]


def _width_choice(plan: Plan, where: str) -> list[Chart]:
    scores, kept = plan.scores.hidden, plan.kept["hidden"]
    assert isinstance(kept, list)
    if len(kept) == len(scores):
        return []
    carried = sum(scores[channel] for channel in kept) / (sum(scores) or 1.0)
    width = plan.pruning.width
    caption = (
        f"The {len(kept):,} {width.unit} left of the line stay, {percent(len(kept) / len(scores))} of them with "
        f"{percent(carried)} of {width.total}; a steep fall before the line means an easy choice."
    )
    return [Chart.of(f"Width{where}", width_scores(scores, kept, width.unit, width.label), caption)]


def _expert_choice(plan: Plan, where: str) -> list[Chart]:
    scores = {block: plan.scores.experts[block] for block in plan.expert_groups}
    if all(len(groups) == len(scores[block]) for block, groups in plan.expert_groups.items()):
        return []
    recipe = plan.pruning.experts
    survivors = sum(scores[block][group.base] for block, groups in plan.expert_groups.items() for group in groups) / (
        sum(map(sum, scores.values())) or 1.0
    )
    found = [
        Chart.of(
            f"Expert importance{where}",
            expert_importance(scores),
            f"{recipe.importance.heading}, as multiples of the layer’s mean; the survivors carry "
            f"{percent(survivors)} of it. Look for layers that are pale: there the choice hardly matters.",
        ),
        Chart.of(
            f"What became of each expert{where}",
            expert_fates(scores, plan.expert_groups),
            f"{recipe.compression.outcome} Same order as the importance; a base that absorbed no other expert counts as kept.",
        ),
    ]
    if any(len(group.members) > 1 for groups in plan.expert_groups.values() for group in groups):
        caption = (
            "How many experts each survivor was averaged from, and, where the pointer is, which. A single dark square in "
            "a row is a base that took in most of what left."
        )
        found.append(Chart.of(f"Merge groups{where}", merge_groups(plan.expert_groups), caption))
    return found
