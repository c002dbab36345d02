"""The sections on what was cut, and over which stages."""

from dataclasses import dataclass

from slimqwen.planning.plan import Plan
from slimqwen.recipe import Target
from slimqwen.reporting.charts.models import parameters
from slimqwen.reporting.charts.style import part_colours
from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.sections.amounts import amount, percent
from slimqwen.reporting.sections.chart import Chart
from slimqwen.reporting.titles import MAIN_RUN

PART_NAMES = {
    "routed_experts": "Routed experts",
    "shared_experts": "Shared experts",
    "deltanet": "DeltaNet",
    "attention": "Attention",
    "embedding": "Embedding and output head",
    "router": "Router",
    "norm": "Norms",
}
SHAPE_NAMES = {
    "num_hidden_layers": "Decoder layers",
    "hidden_size": "Hidden size",
    "num_experts": "Routed experts per layer",
    "num_experts_per_tok": "Experts per token (top-k)",
}


@dataclass(frozen=True)
class Shapes:
    """Sizes and parameters before and after."""

    after: str  # the title of the smaller model
    sizes: list[tuple[str, int, int]]  # name, before, after
    parts: list[tuple[str, str, int, int]]  # colour in the chart, name, parameters before, after
    totals: list[tuple[str, int, int]]
    chart: Chart


def compare_shapes(run: Run) -> Shapes | None:
    """Compare sizes and parameters before the first plan and after the last."""
    if not run.plans:
        return None
    before, after = run.plans[0].before, run.plans[-1].after
    source, target = source_shape(run.plans[0]).model_dump(), run.plans[-1].target.model_dump()
    names = part_names(run.plans[0])
    colours = part_colours(list(names))
    share = after.total_parameters / before.total_parameters
    smaller = "result" if run.evaluation else f"after stage {len(run.plans)}"
    return Shapes(
        after=smaller,
        sizes=[(name, source[key], target[key]) for key, name in SHAPE_NAMES.items()],
        parts=[
            (colours[part], name, before.parts.get(part, 0), after.parts.get(part, 0)) for part, name in names.items()
        ],
        totals=[
            ("Total", before.total_parameters, after.total_parameters),
            ("Active per token", before.active_parameters, after.active_parameters),
            *[("MTP module (counted apart)", before.mtp_parameters, after.mtp_parameters)]
            * bool(before.mtp_parameters),
        ],
        chart=Chart.of(
            "Where the parameters are",
            parameters({"teacher": before, smaller: after}, names),
            f"{percent(share)} of the teacher’s parameters are left; look for the part that shrinks most. Colours as in the "
            "table.",
        ),
    )


def source_shape(plan: Plan) -> Target:
    """Return the four sizes of the model that `plan` cuts; top-k follows from its active parameters."""
    scores, counts = plan.scores, plan.before
    experts = len(next(iter(scores.experts.values())))
    routed = counts.parts["routed_experts"]
    always_active = counts.total_parameters - routed - counts.parts.get("vision", 0)
    active_routed = counts.active_parameters - always_active
    return Target(
        num_hidden_layers=len(scores.layer_block_influence),
        hidden_size=len(scores.hidden),
        num_experts=experts,
        num_experts_per_tok=active_routed * experts // routed,
    )


def part_names(plan: Plan) -> dict[str, str]:
    """Return the parts counted in the plan, largest first, with their titles."""
    largest_first = sorted(plan.before.parts, key=lambda part: -plan.before.parts[part])
    return {part: PART_NAMES.get(part, part.replace("_", " ")) for part in largest_first}


@dataclass(frozen=True)
class StageRow:
    """A row of the table of stages."""

    name: str
    sizes: list[tuple[int, bool]]  # in the order of SHAPE_NAMES; whether the stage changed it
    tokens: str
    parameters: str
    share: str


def list_stages(run: Run) -> list[StageRow]:
    """List the stages over which the cut was spread."""
    if not run.plans:
        return []
    teacher = run.plans[0].before.total_parameters
    shape = source_shape(run.plans[0]).model_dump()
    rows = [StageRow("teacher", [(shape[key], False) for key in SHAPE_NAMES], "–", amount(teacher), percent(1.0))]
    steps = run.steps.get(MAIN_RUN)
    seen = 0.0
    for number, plan in enumerate(run.plans, start=1):
        after = plan.target.model_dump()
        tokens = "–"
        if steps is not None and number in steps.stage:
            until = float(steps.tokens[steps.stage == number][-1])
            tokens, seen = f"{until - seen:,.0f}", until
        total = plan.after.total_parameters
        sizes = [(after[key], after[key] != shape[key]) for key in SHAPE_NAMES]
        rows.append(StageRow(f"after stage {number}", sizes, tokens, amount(total), percent(total / teacher)))
        shape = after
    return rows
