"""The page of a study: findings first, then our table beside the paper's, the differences and the curves."""

from html import escape
from pathlib import Path
from statistics import fmean, stdev

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from slimqwen.artifacts import write_text
from slimqwen.reporting import report as reporting
from slimqwen.reporting.charts import PART_COLOURS
from slimqwen.study.result import Run, Study
from slimqwen.study.verdict import interval, measured

TEMPLATES = Path(reporting.__file__).parent
MINUS = "\N{MINUS SIGN}"

COLUMNS = {
    "loss": ("loss", 3),
    "kl_to_teacher": ("KL to teacher", 3),
    "top1_agreement": ("top-1", 3),
    "mtp_loss": ("MTP loss", 3),
    **{f"acc_{depth}": (f"acc_{depth}", 3) for depth in range(5)},
    "tokens_per_verification": ("tokens per pass", 2),
}
LOWER_IS_BETTER = {"loss", "kl_to_teacher", "mtp_loss"}


def write_page(study: Study, out: Path) -> None:
    """One self-contained HTML file; no external request."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("study.html.j2").render(
        study=study,
        tables=[table for one_shot in (True, False) if (table := _table(study, one_shot)) is not None],
        charts=[chart for chart in (_differences(study), _curves(study)) if chart is not None],
        plotly_js=Markup(get_plotlyjs()),  # the library's own text, from the installed package
    )
    write_text(out, page)


def runs_of(study: Study, arm: str, one_shot: bool) -> list[Run]:
    """An arm's runs by seed; empty where it was not measured at that time."""
    runs = [run for run in study.runs if run.arm == arm]
    return [run for run in runs if (run.one_shot if one_shot else run.metrics) is not None]


def _table(study: Study, one_shot: bool) -> dict[str, object] | None:
    """Mean and standard deviation over seeds of each arm, the paper's numbers to the right."""
    measured_arms = [arm for arm in study.arms if runs_of(study, arm.name, one_shot)]
    if not measured_arms:
        return None
    numbers = {
        arm.name: [measured(run, one_shot) for run in runs_of(study, arm.name, one_shot)] for arm in measured_arms
    }
    columns = [name for name in COLUMNS if all(name in values for rows in numbers.values() for values in rows)]
    paper = list(dict.fromkeys(column for arm in measured_arms for column in arm.paper))
    rows = []
    for arm in measured_arms:
        cells = [_spread([values[name] for values in numbers[arm.name]], COLUMNS[name][1]) for name in columns]
        theirs = [f"{arm.paper[column]:.2f}" if column in arm.paper else "" for column in paper]
        run = runs_of(study, arm.name, one_shot)[0]
        rows.append(
            {
                "title": arm.title,
                "is_baseline": arm.name == study.baseline,
                "parameters": f"{run.total_parameters:,}",
                "cells": cells,
                "paper": theirs,
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


def _spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.{digits}f}"


def _differences(study: Study) -> dict[str, object] | None:
    """Each arm against the baseline, seed by seed: KL to the teacher, with the 95 % interval of the mean."""
    one_shot = not any(run.metrics for run in study.runs)
    metric = "kl_to_teacher"
    baseline = {run.seed: measured(run, one_shot) for run in runs_of(study, study.baseline, one_shot)}
    titles, means, below, above = [], [], [], []
    for arm in study.arms:
        if arm.name == study.baseline or not runs_of(study, arm.name, one_shot):
            continue
        gaps = [
            measured(run, one_shot)[metric] - baseline[run.seed][metric] for run in runs_of(study, arm.name, one_shot)
        ]
        mean = fmean(gaps)
        low, high = interval(gaps) or (mean, mean)
        titles.append(escape(arm.title))
        means.append(mean)
        below.append(mean - low)
        above.append(high - mean)
    if not titles:
        return None
    figure = go.Figure(
        go.Scatter(
            x=means,
            y=titles,
            mode="markers",
            marker={"size": 9, "color": PART_COLOURS[0]},
            error_x={"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.5},
            hovertemplate="%{y}: %{x:+.3f}<extra></extra>",
        )
    )
    figure.add_vline(x=0, line={"color": "#79818b", "dash": "dash", "width": 1.5})
    figure.update_xaxes(title="KL to the teacher minus the baseline's, nats per token")
    figure.update_yaxes(autorange="reversed", automargin=True)
    baseline_title = next(arm.title for arm in study.arms if arm.name == study.baseline)
    return _chart(
        figure,
        f"Difference to “{baseline_title}”",
        "Paired by seed; the bars are 95 % confidence intervals of the mean. Left of the line is better than the baseline.",
        height=120 + 34 * len(titles),
    )


def _curves(study: Study) -> dict[str, object] | None:
    """The training loss of each arm, the mean over seeds."""
    figure = go.Figure()
    for number, arm in enumerate(study.arms):
        curves = [run.curve for run in study.runs if run.arm == arm.name and run.curve]
        if not curves:
            continue
        points = list(zip(*curves, strict=True))
        figure.add_scatter(
            x=[group[0].tokens for group in points],
            y=[fmean(point.lm for point in group) for group in points],
            mode="lines",
            name=escape(arm.title),
            line={
                "color": PART_COLOURS[number % len(PART_COLOURS)],
                "width": 2,
                "dash": _DASHES[number // len(PART_COLOURS)],
            },
            hovertemplate="%{y:.3f}",
        )
    if not figure.data:
        return None
    figure.update_xaxes(title="training tokens", tickformat="~s", rangemode="tozero")
    figure.update_yaxes(title="training loss, nats per token")
    figure.update_layout(hovermode="x unified", legend={"orientation": "h", "x": 0, "y": 1.04, "yanchor": "bottom"})
    return _chart(
        figure,
        "Training loss",
        "Cross entropy on the training text, means over a few steps and over seeds; every arm reads the same text in the same order.",
        height=460,
    )


_DASHES = ("solid", "dash", "dot")


def _chart(figure: go.Figure, title: str, caption: str, *, height: int) -> dict[str, object]:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 14, "t": 14, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        dragmode=False,
    )
    figure.update_xaxes(zeroline=False, automargin=True)
    return {"title": title, "caption": caption, "spec": figure.to_plotly_json()}
