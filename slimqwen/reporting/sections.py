"""The sections of the page, top to bottom: what each shows, out of the artefacts of a run.

Each is None or empty where the run has nothing to show in it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from slimqwen.evaluation.result import ModelEvaluation, Sample
from slimqwen.planning.plan import Plan
from slimqwen.progress import duration
from slimqwen.recipe import BUILTIN_TEACHER, Target
from slimqwen.reporting import charts
from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.titles import MAIN_RUN, title_of

CLEARLY_LESS = 0.8  # a KL at most this share of a baseline's is "clearly" better

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
class Verdict:
    tone: str  # "good", "mixed", "bad", or "plain" where there is nothing to judge by
    headline: str
    sentence: str


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    context: str


@dataclass(frozen=True)
class Chart:
    """A figure with what it needs around it. `spec` is plotly's JSON: data and layout."""

    title: str
    caption: str
    spec: Any

    @classmethod
    def of(cls, title: str, figure: go.Figure, caption: str) -> "Chart":
        return cls(title, caption, json.loads(figure.to_json()))


def subtitle(run: Run) -> str:
    recipe = run.recipe
    teacher = "the built-in teacher" if recipe.teacher == BUILTIN_TEACHER else recipe.teacher
    how = "trained from random weights" if recipe.init == "random" else f"pruned in {_stage_words(run)}, then distilled"
    if not {"kd", "mtp_kd"} & set(recipe.distil.terms):
        how = how.replace("distilled", "trained on text alone")
    return f"From {teacher}, {how}, on {recipe.distil.tokens:,} tokens."


def _stage_words(run: Run) -> str:
    """`2 stages (depth first)`; how many a schedule has is known when its last plan is made."""
    count = len(run.recipe.stages) if run.recipe.stages is not None else len(run.plans) if run.evaluation else 0
    stages = "one stage" if count == 1 else f"{count} stages" if count else "stages"
    return stages if run.recipe.stages is not None else f"{stages} ({run.recipe.schedule.replace('_', ' ')})"


def verdict(run: Run) -> Verdict:
    """What a reader in a hurry needs: was it better than starting over, and how near is it to the teacher."""
    teacher, result = run.teacher, run.result
    if teacher is None or result is None:
        return Verdict("plain", "Not evaluated yet.", _progress_sentence(run))
    sentence = (
        f"{_percent(result.total_parameters / teacher.total_parameters)} of the teacher’s parameters; "
        f"held-out loss {result.loss:.2f} against the teacher’s {teacher.loss:.2f}"
    )
    random, pruned = run.kl("random_init"), run.kl("pruned")
    kl = result.kl_to_teacher
    if kl is None:
        return Verdict("plain", "Trained and evaluated.", f"{sentence}.")
    sentence += f"; KL to the teacher {kl:.2f}"
    if run.recipe.init == "random":
        return Verdict("plain", "Trained from random weights: a baseline for a pruned run.", f"{sentence}.")
    if random is not None:
        sentence += f", random initialisation trained on the same tokens: {random:.2f}"
    if pruned is not None and (random is None or kl >= pruned):
        sentence += f", the same cut before any training: {pruned:.2f}"
    tone, headline = _judgement(kl, random, pruned)
    return Verdict(tone, headline, f"{sentence}.")


def _judgement(kl: float, random: float | None, pruned: float | None) -> tuple[str, str]:
    """Tone and headline for a pruned and trained model's KL to the teacher beside those of its baselines."""
    if pruned is not None and kl >= pruned:
        return "bad", "It did not work: after training, the model is no nearer to the teacher than after the cut alone."
    if random is not None and kl >= random:
        return "bad", "It did not work: starting from random weights came as near to the teacher, or nearer."
    if random is not None and kl > CLEARLY_LESS * random:
        return "mixed", "It worked, narrowly: pruning the teacher beat starting from random weights by a little."
    if random is not None:
        return "good", "It worked: pruning the teacher clearly beat starting from random weights."
    if pruned is not None:
        return "good", "Training brought the pruned model back towards the teacher."
    return "plain", "Trained and evaluated; no baseline was asked for to compare with."


def _progress_sentence(run: Run) -> str:
    steps = run.steps.get(MAIN_RUN)
    if steps is None:
        return "There is no training step so far; run the recipe again to continue."
    done = min(steps.tokens[-1] / run.recipe.distil.tokens, 1.0)
    return f"Training has seen {steps.tokens[-1]:,.0f} tokens, {_percent(done)} of the recipe’s; run the recipe again to continue."


def tiles(run: Run) -> list[Tile]:
    """The few numbers that sum the run up."""
    found = []
    teacher, result = run.teacher, run.result
    if teacher is not None and result is not None:
        found = [
            _share_tile("Parameters", teacher.total_parameters, result.total_parameters),
            _share_tile("Active per token", teacher.active_parameters, result.active_parameters),
            Tile("Held-out loss", f"{result.loss:.2f}", f"nats per token; teacher {teacher.loss:.2f}"),
        ]
        if result.kl_to_teacher is not None:
            random = run.kl("random_init")
            context = "0 is the teacher" if random is None else f"{title_of('random_init')} {random:.2f}"
            found.append(Tile("KL to the teacher", f"{result.kl_to_teacher:.2f}", f"nats per token; {context}"))
        if result.top1_agreement is not None:
            context = "of predictions are the teacher’s"
            found.append(Tile("Top-1 agreement", _percent(result.top1_agreement), context))
    if run.times:
        found.append(Tile("Time", duration(sum(step.seconds for step in run.times)), f"{len(run.times)} steps"))
    return found


def _share_tile(label: str, before: int, after: int) -> Tile:
    return Tile(label, _percent(after / before), f"{_amount(after)} of {_amount(before)}")


@dataclass(frozen=True)
class ResultTable:
    tokens: int
    sequence_length: int
    columns: list[str]
    rows: list[tuple[str, str, list[str]]]  # name, title, cells


def results(run: Run) -> ResultTable | None:
    """The final table: a row per model, the teacher first."""
    if run.evaluation is None:
        return None
    models = run.evaluation.models
    depth = max((len(model.mtp_acceptance) for model in models.values()), default=0)
    teacher = run.teacher

    def size(value: int, of: int | None) -> str:
        return _amount(value) if of is None else f"{_amount(value)} ({_percent(value / of)})"

    rows = []
    for name, model in models.items():
        acceptance = [_percent(rate) for rate in model.mtp_acceptance]
        cells = [
            size(model.total_parameters, teacher.total_parameters if teacher else None),
            size(model.active_parameters, teacher.active_parameters if teacher else None),
            f"{model.loss:.3f}",
            f"{model.perplexity:,.2f}" if model.perplexity < 1000 else f"{model.perplexity:,.0f}",
            f"{model.bits_per_byte:.3f}",
            "–" if model.kl_to_teacher is None else f"{model.kl_to_teacher:.3f}",
            "–" if model.top1_agreement is None else _percent(model.top1_agreement),
            *acceptance,
            *["–"] * (depth - len(acceptance)),
        ]
        rows.append((name, title_of(name), cells))
    columns = ["total parameters", "active", "loss", "perplexity", "bits/byte", "KL", "top-1"]
    columns += [f"acc_{k}" for k in range(depth)]
    return ResultTable(run.evaluation.tokens, run.evaluation.sequence_length, columns, rows)


@dataclass(frozen=True)
class Shapes:
    after: str  # what the smaller model is called
    sizes: list[tuple[str, int, int]]  # name, before, after
    parts: list[tuple[str, str, int, int]]  # colour in the chart, name, parameters before, after
    totals: list[tuple[str, int, int]]
    chart: Chart


def shapes(run: Run) -> Shapes | None:
    """What was cut: sizes and parameters before the first plan and after the last."""
    if not run.plans:
        return None
    before, after = run.plans[0].before, run.plans[-1].after
    source, target = source_shape(run.plans[0]).model_dump(), run.plans[-1].target.model_dump()
    names = part_names(run.plans[0])
    colours = charts.part_colours(list(names))
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
            ("MTP module (counted apart)", before.mtp_parameters, after.mtp_parameters),
        ],
        chart=Chart.of(
            "Where the parameters are",
            charts.parameters({"teacher": before, smaller: after}, names),
            f"{_percent(share)} of the teacher’s parameters are left; look for the part that pays for most of the "
            "cut. Colours as in the table.",
        ),
    )


def source_shape(plan: Plan) -> Target:
    """The four sizes of the model that `plan` cuts. Top-k is what makes its active parameters what they are."""
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
    """The parts that the plan counts, largest first, and what the page calls them."""
    largest_first = sorted(plan.before.parts, key=lambda part: -plan.before.parts[part])
    return {part: PART_NAMES.get(part, part.replace("_", " ")) for part in largest_first}


@dataclass(frozen=True)
class StageRow:
    name: str
    sizes: list[tuple[int, bool]]  # in the order of SHAPE_NAMES; whether the stage changed it
    tokens: str
    parameters: str
    share: str


def stages(run: Run) -> list[StageRow]:
    """How the cut was spread over the stages."""
    if not run.plans:
        return []
    teacher = run.plans[0].before.total_parameters
    shape = source_shape(run.plans[0]).model_dump()
    rows = [StageRow("teacher", [(shape[key], False) for key in SHAPE_NAMES], "–", _amount(teacher), _percent(1.0))]
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
        rows.append(StageRow(f"after stage {number}", sizes, tokens, _amount(total), _percent(total / teacher)))
        shape = after
    return rows


def curves(run: Run) -> list[Chart]:
    """Training, of all runs, against tokens."""
    found = []
    boundary = " Dashed lines: the next stage’s cut." if any(np.ptp(s.stage) for s in run.steps.values()) else ""
    for field_name, title, quantity, logarithmic, caption in (
        ("lm", "Language-modelling loss", "nats per token", False, "Lower is better, and so is falling earlier."),
        (
            "kd",
            "KL to the teacher",
            "nats per token (log)",
            True,
            "0 would be the teacher itself; the gap between two curves is what the start was worth.",
        ),
        (
            "mtp_kd",
            "KL of the multi-token-prediction head",
            "nats per token (log)",
            True,
            "The drafting head, against the teacher’s distribution for the token after next.",
        ),
    ):
        shown = {name: steps for name, steps in run.steps.items() if steps.has(field_name)}
        if shown:
            figure = charts.learning_curves(shown, field_name, quantity, logarithmic=logarithmic)
            found.append(Chart.of(title, figure, caption + boundary))
    if MAIN_RUN in run.steps:
        caption = (
            "What the recipe asked for: the weights of the loss terms, and one learning-rate curve over all stages."
        )
        found.append(Chart.of("Loss weights and learning rate", charts.schedules(run.steps, MAIN_RUN), caption))
    return found


def choices(run: Run) -> list[list[Chart]]:
    """What was kept and why, axis by axis: the scores, from the plans that cut it."""
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
    quantity = "cosine of input and output" if criterion == "similarity" else "block influence, 1 − cosine"
    values = scores.layer_similarity if criterion == "similarity" else scores.layer_block_influence
    reason = {
        "last": "The last layers went, whatever their score; the score says how much each turns the hidden state.",
        "similarity": "A run of layers went that starts at the highest cosine: where the mean hidden state turns least.",
        "block_influence": "The lowest bars went: the layers that turn the hidden state least.",
    }[criterion]
    return [Chart.of(f"Layers{where}", charts.layer_scores(values, plan.kept_layers, quantity), reason)]


def _width_choice(plan: Plan, where: str) -> list[Chart]:
    scores, kept = plan.scores.hidden, plan.kept["hidden"]
    assert isinstance(kept, list)
    if len(kept) == len(scores):
        return []
    carried = sum(scores[channel] for channel in kept) / (sum(scores) or 1.0)
    caption = (
        f"The {len(kept):,} channels left of the line stay, {_percent(len(kept) / len(scores))} of them with "
        f"{_percent(carried)} of all activation; a steep fall before the line means an easy choice."
    )
    return [Chart.of(f"Width{where}", charts.width_scores(scores, kept), caption)]


def _expert_choice(plan: Plan, where: str) -> list[Chart]:
    scores = {block: plan.scores.experts[block] for block in plan.expert_groups}
    if all(len(groups) == len(scores[block]) for block, groups in plan.expert_groups.items()):
        return []
    recipe = plan.pruning.experts
    survivors = sum(scores[block][group.base] for block, groups in plan.expert_groups.items() for group in groups) / (
        sum(map(sum, scores.values())) or 1.0
    )
    score = {"frequency": "Share of tokens", "soft_logits": "Mean gate weight", "reap": "REAP score"}[recipe.importance]
    how = {
        "prune": "The least important experts were dropped.",
        "merge": "Every expert that left was averaged into the survivor most like it, its base.",
        "partial": "The better half of the survivors stayed as they were (kept); the others are bases, which absorbed the rest.",
    }[recipe.compression]
    return [
        Chart.of(
            f"Expert importance{where}",
            charts.expert_importance(scores),
            f"{score}, as multiples of the layer’s mean; the survivors carry "
            f"{_percent(survivors)} of it. Look for layers that are pale: there the choice hardly matters.",
        ),
        Chart.of(
            f"What became of each expert{where}",
            charts.expert_fates(scores, plan.expert_groups),
            f"{how} Same order as the importance; a base that absorbed nobody counts as kept.",
        ),
    ]


def utilisation(run: Run) -> list[Chart]:
    """How evenly tokens are spread over experts, before and after."""
    models = run.evaluation.models if run.evaluation else {}
    return [
        Chart.of(
            f"Expert use: {title_of(name)}",
            charts.expert_use(models[name].expert_utilisation),
            "Share of the held-out tokens, as multiples of an even share; brown on the right means experts that idle, "
            "a short dark left means a few that do everything.",
        )
        for name in ("teacher", MAIN_RUN)
        if name in models and models[name].expert_utilisation
    ]


def samples(run: Run) -> list[tuple[str, Sample]]:
    models: Mapping[str, ModelEvaluation] = run.evaluation.models if run.evaluation else {}
    return [(title_of(name), model.sample) for name, model in models.items() if model.sample is not None]


@dataclass(frozen=True)
class TimeRow:
    step: str
    time: str
    share: float  # of the longest step
    memory: str


def times(run: Run) -> list[TimeRow]:
    longest = max((step.seconds for step in run.times), default=0.0) or 1.0
    return [
        TimeRow(
            step.step,
            duration(step.seconds) if step.seconds >= 1 else "< 1 s",
            step.seconds / longest,
            "–" if step.peak_memory_bytes is None else f"{step.peak_memory_bytes / 2**30:,.2f} GiB",
        )
        for step in run.times
    ]


def _percent(fraction: float) -> str:
    """`34 %`, `3.4 %`: two digits are what a reader compares."""
    return f"{100 * fraction:.0f}\u00a0%" if fraction >= 0.0995 or fraction == 0 else f"{100 * fraction:.1f}\u00a0%"


def _amount(parameters: int) -> str:
    """`4.70 M`, `79.7 B`: three digits and a unit."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if parameters >= size:
            value = parameters / size
            return f"{value:.{max(0, 2 - (value >= 10) - (value >= 100))}f}\u00a0{unit}"
    return str(parameters)
