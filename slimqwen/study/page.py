"""The HTML page of a study: findings, our table beside the paper's, differences to the baseline, training curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import jinja2

from slimqwen import reporting
from slimqwen.artifacts import write_text
from slimqwen.study.drawing import Interval, curves, intervals
from slimqwen.study.result import Arm, Run, Study
from slimqwen.study.verdict import interval, measured, signed

TEMPLATES = [Path(__file__).parent, Path(reporting.__file__).parent]  # the latter has page.css, shared by all pages
COLUMNS = {
    "loss": ("loss", 3),
    "kl_to_teacher": ("KL to teacher", 3),
    "top1_agreement": ("top-1", 3),
    "mtp_loss": ("MTP loss", 3),
    **{f"acc_{depth}": (f"acc_{depth}", 3) for depth in range(5)},
    "tokens_per_verification": ("tokens per forward pass", 2),
}


def write_page(study: Study, out: Path) -> None:
    """Write a study's page, one self-contained HTML file without scripts."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("page.html.j2").render(
        study=study,
        tables=[table for one_shot in (True, False) if (table := _table(study, one_shot)) is not None],
        sources=[
            source["builtin"] or Path(source["path"] or source["megatron"]).name
            for source in study.recipe["data"]["sources"]
        ],
        charts=[chart for chart in (_differences_chart(study), _curves_chart(study)) if chart is not None],
    )
    write_text(out, page)


def runs_of(study: Study, arm: str, one_shot: bool) -> list[Run]:
    """Return an arm's runs by seed that were measured before training (`one_shot`) or after it."""
    runs = [run for run in study.runs if run.arm == arm]
    return [run for run in runs if (run.one_shot if one_shot else run.metrics) is not None]


def _table(study: Study, one_shot: bool) -> dict[str, object] | None:
    """Tabulate mean and standard deviation over seeds of each arm, the paper's numbers first; None without a measured arm."""
    measured_arms = [arm for arm in study.arms if runs_of(study, arm.name, one_shot)]
    if not measured_arms:
        return None
    numbers = {
        arm.name: [measured(run, one_shot) for run in runs_of(study, arm.name, one_shot)] for arm in measured_arms
    }
    columns = [name for name in COLUMNS if all(name in values for rows in numbers.values() for values in rows)]
    published = dict.fromkeys(column for arm in measured_arms for column in arm.paper)
    paper = [column for column in published if ("one-shot" in column) == one_shot]  # the others are of trained models
    groups = _group_equal(measured_arms, numbers) if one_shot else {arm.name: [arm] for arm in measured_arms}
    rows = []
    for arm, *others in groups.values():
        cells = [_spread([values[name] for values in numbers[arm.name]], COLUMNS[name][1]) for name in columns]
        papers_cells = [f"{arm.paper[column]:.2f}" if column in arm.paper else "" for column in paper]
        run = runs_of(study, arm.name, one_shot)[0]
        rows.append(
            {
                "title": "; ".join([arm.title, *(other.title for other in others)])
                if len(others) < 2
                else f"{arm.title} (and {len(others)} with the same start)",
                "is_baseline": study.baseline in {arm.name, *(other.name for other in others)},
                "parameters": f"{run.total_parameters:,}",
                "cells": cells,
                "paper": papers_cells,
            }
        )
    teacher = [f"{study.teacher[name]:.{COLUMNS[name][1]}f}" if name in study.teacher else "" for name in columns]
    return {
        "title": "Before training" if one_shot else "After training",
        "columns": [COLUMNS[name][0] for name in columns],
        "paper": [f"paper: {column}" for column in paper],
        "rows": rows,
        "teacher": teacher,
    }


def _group_equal(arms: Sequence[Arm], numbers: Mapping[str, object]) -> dict[str, list[Arm]]:
    """Group arms with equal numbers: those that differ in their training only are equal before it."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(str(numbers[arm.name]), []).append(arm)
    return groups


def _spread(values: list[float], digits: int) -> str:
    """Format the mean, and the standard deviation where there are several values."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.{digits}f}"


def _differences_chart(study: Study) -> dict[str, object] | None:
    """Chart each arm's KL to the teacher minus the baseline's, paired by seed, after training where there was any."""
    one_shot = not any(run.metrics for run in study.runs)
    metric = "kl_to_teacher"
    baseline = {run.seed: measured(run, one_shot)[metric] for run in runs_of(study, study.baseline, one_shot)}
    rows: dict[str, Interval] = {}
    numbers = []
    for arm in study.arms:
        if arm.name != study.baseline and (runs := runs_of(study, arm.name, one_shot)):
            gaps = [measured(run, one_shot)[metric] - baseline[run.seed] for run in runs]
            mean = fmean(gaps)
            bounds = interval(gaps)
            rows[arm.title] = (mean, *(bounds or (mean, mean)))
            words = "one seed" if bounds is None else f"{signed(bounds[0])} to {signed(bounds[1])}"
            numbers.append({"title": arm.title, "mean": signed(mean), "interval": words})
    if not rows:
        return None
    title = next(arm.title for arm in study.arms if arm.name == study.baseline)
    return {
        "title": f"Difference to “{title}”",
        "caption": "Paired by seed, with the 95 % confidence interval of the mean. Left of the dashed line is better than the baseline.",
        "drawing": intervals(rows, "KL to the teacher minus the baseline's, nats per token"),
        "rows": numbers,
    }


def _curves_chart(study: Study) -> dict[str, object] | None:
    """Chart the training loss of each arm, as the mean over seeds."""
    lines = {}
    for arm in study.arms:
        runs = [run.curve for run in study.runs if run.arm == arm.name and run.curve]
        points = list(zip(*runs, strict=True))
        if points:
            lines[arm.title] = [(group[0].tokens, fmean(point.lm for point in group)) for group in points]
    if not lines:
        return None
    return {
        "title": "Training loss",
        "rows": [],
        "caption": "Cross entropy on the training text, means over a few steps and over seeds; every arm is trained on the same text in the same order.",
        "drawing": curves(lines, "training tokens", "training loss, nats per token"),
    }
