"""The section on training: curves of the logged metrics, and chosen learning rates."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from slimqwen.reporting.charts.curves import AXES, Steps, acceptance, axes_of, learning_curves, schedules
from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.sections.chart import Chart
from slimqwen.reporting.titles import MAIN_RUN
from slimqwen.training.learning_rate import in_words

# field, title, quantity, whether the axis is logarithmic, caption
CURVES = (
    ("lm", "Language-modelling loss", "nats per token", False, "Lower is better, and so is an earlier drop."),
    (
        "kd",
        "KL to the teacher",
        "nats per token (log)",
        True,
        "0 is the teacher itself; the gap between two curves is the advantage of the better start.",
    ),
    (
        "mtp_lm",
        "Loss of the multi-token-prediction head",
        "nats per token",
        False,
        "The MTP head’s loss on the text, for the token after next.",
    ),
    (
        "mtp_kd",
        "KL of the multi-token-prediction head",
        "nats per token (log)",
        True,
        "The MTP head, against the teacher’s distribution for the token after next.",
    ),
    (
        "load_balancing",
        "Load balancing",
        "loss term",
        False,
        "1 is an even load; a rising line means that the load concentrates on few experts.",
    ),
    (
        "tokens_per_second",
        "Throughput",
        "tokens per second",
        False,
        "Drops are held-out measurements, saved states or a busy machine; a step between stages is the cut’s gain.",
    ),
)


def draw_runs(runs: Mapping[str, Steps]) -> list[Chart]:
    """Make one chart per logged metric, with all runs together, over the axes that they have in common."""
    found = []
    axes = axes_of(runs)
    boundary = " Dashed lines: the next stage’s cut." if any(np.ptp(steps.stage) for steps in runs.values()) else ""
    for field, title, quantity, logarithmic, caption in CURVES:
        shown = {name: steps for name, steps in runs.items() if steps.has(field)}
        if shown:
            draw = partial(learning_curves, shown, field, quantity, logarithmic=logarithmic)
            measured = any(steps.has(f"heldout_{field}") for steps in shown.values())
            note = " Diamonds: on held-out text." if measured else ""
            found.append(Chart.along(title, draw, axes, caption + note + boundary))
    drafting = {name: steps for name, steps in runs.items() if steps.has("acc_0")}
    if drafting:
        caption = "Share of the MTP head’s drafts that equal the model’s own next tokens, on held-out prompts."
        found.append(Chart.along("MTP acceptance", partial(acceptance, drafting), axes, caption + boundary))
    return found


def draw_curves(run: Run) -> list[Chart]:
    """Make the charts of the run and its baselines, and of the run's loss weights and learning rate."""
    found = draw_runs(run.steps)
    if MAIN_RUN in run.steps:
        caption = "As set by the recipe: the weights of the loss terms, and one learning-rate curve over all stages."
        draw = partial(schedules, run.steps, MAIN_RUN)
        found.append(Chart.along("Loss weights and learning rate", draw, axes_of(run.steps), caption))
    return found


def learning_rates(run: Run) -> list[tuple[str, str]]:
    """List the choices of `learning_rate: auto`: the training's folder, and a sentence with the reason."""
    return [(name, in_words(choice)) for name, choice in run.learning_rates.items()]


def axis_names(runs: Mapping[str, Steps]) -> dict[str, str]:
    """Return the axes that the page offers for the curves; empty where there is no choice."""
    axes = axes_of(runs)
    return {axis: AXES[axis] for axis in axes} if len(axes) > 1 else {}
