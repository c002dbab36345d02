"""Training: its curves."""

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
    ("lm", "Language-modelling loss", "nats per token", False, "Lower is better, and so is falling earlier."),
    (
        "kd",
        "KL to the teacher",
        "nats per token (log)",
        True,
        "0 would be the teacher itself; the gap between two curves is what the start was worth.",
    ),
    (
        "mtp_lm",
        "Loss of the multi-token-prediction head",
        "nats per token",
        False,
        "The drafting head’s loss on the text, of the token after next.",
    ),
    (
        "mtp_kd",
        "KL of the multi-token-prediction head",
        "nats per token (log)",
        True,
        "The drafting head, against the teacher’s distribution for the token after next.",
    ),
    ("load_balancing", "Load balancing", "loss term", False, "1 is an even load; a rising line means busy favourites."),
    (
        "tokens_per_second",
        "Throughput",
        "tokens per second",
        False,
        "Drops are held-out measurements, saved states or a busy machine; a step between stages is the cut’s gain.",
    ),
)


def curves_of(runs: Mapping[str, Steps]) -> list[Chart]:
    """One chart per logged quantity, the runs together, against whatever axes they all have."""
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
        caption = "Share of the drafting head’s tokens that the model itself would have said, on held-out prompts."
        found.append(Chart.along("MTP acceptance", partial(acceptance, drafting), axes, caption + boundary))
    return found


def curves(run: Run) -> list[Chart]:
    """The run and its baselines, and what the recipe asked of the run."""
    found = curves_of(run.steps)
    if MAIN_RUN in run.steps:
        caption = (
            "What the recipe asked for: the weights of the loss terms, and one learning-rate curve over all stages."
        )
        draw = partial(schedules, run.steps, MAIN_RUN)
        found.append(Chart.along("Loss weights and learning rate", draw, axes_of(run.steps), caption))
    return found


def learning_rates(run: Run) -> list[tuple[str, str]]:
    """What `learning_rate: auto` chose, and by what: the training's folder and a sentence."""
    return [(name, in_words(choice)) for name, choice in run.learning_rates.items()]


def axis_names(runs: Mapping[str, Steps]) -> dict[str, str]:
    """What the reader can choose to see curves against; empty where there is no choice."""
    axes = axes_of(runs)
    return {axis: AXES[axis] for axis in axes} if len(axes) > 1 else {}
