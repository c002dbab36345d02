"""Charts of logged metrics of training over tokens, FLOPs or hours."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from slimqwen.reporting.charts.style import CUT, lines, styled
from slimqwen.reporting.titles import title_of

POINTS_PER_CURVE = 800  # more than a screen can resolve; keeps the page small after a million steps
AXES = {"tokens": "training tokens", "flops": "training FLOPs (estimate)", "hours": "hours of training"}

Column = NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """The logged metrics of one run, a value per optimiser step, NaN where none was logged.

    along: the progress at the end of each step, cumulative, by the names of AXES; "tokens" always exists.
    """

    stage: Column
    along: Mapping[str, Column]
    values: Mapping[str, Column]

    @property
    def tokens(self) -> Column:
        """Tokens trained on at the end of each step."""
        return self.along["tokens"]

    def has(self, field: str) -> bool:
        """Return whether a metric was logged at any step."""
        return field in self.values and bool(np.isfinite(self.values[field]).any())


def axes_of(runs: Mapping[str, Steps]) -> list[str]:
    """List the axes over which all of these runs can be drawn."""
    return [
        axis
        for axis in AXES
        if runs and all(axis in steps.along and np.isfinite(steps.along[axis]).all() for steps in runs.values())
    ]


def learning_curves(
    runs: Mapping[str, Steps], field: str, quantity: str, *, axis: str = "tokens", logarithmic: bool = False
) -> go.Figure:
    """Draw one metric of every run that has it: a moving mean, with the raw values faint behind it.

    Diamonds: the same metric on held-out text, where it was measured during training.
    """
    figure = go.Figure()
    styles = lines(list(runs))
    for run, steps in runs.items():
        if not steps.has(field):
            continue
        shown = _thinned(len(steps.tokens))
        name, line, values = escape(title_of(run)), styles[run], steps.values[field]
        x = steps.along[axis][shown].astype(np.float32)
        figure.add_scatter(
            x=x,
            y=values[shown].astype(np.float32),
            mode="lines",
            line=line | {"width": 1},
            opacity=0.25,
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_scatter(
            x=x,
            y=_smoothed(values, steps.stage)[shown].astype(np.float32),
            mode="lines",
            line=line | {"width": 2.2},
            name=name,
            hovertemplate="%{y:,.4~g}",
        )
        if steps.has(f"heldout_{field}"):
            _add_measured(figure, steps, f"heldout_{field}", axis, "markers", line, f"{name}, held-out", "diamond")
    _finish(figure, runs, axis)
    figure.update_yaxes(title=quantity)
    if logarithmic:
        figure.update_yaxes(type="log", dtick="D2", tickformat="~g")
    elif field == "tokens_per_second":  # otherwise its noise would fill the chart
        figure.update_yaxes(rangemode="tozero")
    return styled(figure, height=360, legend=True, compare=True)


def acceptance(runs: Mapping[str, Steps], *, axis: str = "tokens") -> go.Figure:
    """Draw the share of accepted MTP drafts, at the steps with held-out measurements."""
    figure = go.Figure()
    for run, line in lines(list(runs)).items():
        for depth, symbol in enumerate(("diamond", "circle-open")):
            if runs[run].has(f"acc_{depth}"):
                name = f"{escape(title_of(run))}, acc_{depth}"
                _add_measured(figure, runs[run], f"acc_{depth}", axis, "lines+markers", line, name, symbol)
    _finish(figure, runs, axis)
    figure.update_yaxes(title="share accepted", rangemode="tozero")
    return styled(figure, height=360, legend=True, compare=True)


def schedules(runs: Mapping[str, Steps], run: str, *, axis: str = "tokens") -> go.Figure:
    """Draw the weights of the loss terms and, below, the learning rate."""
    steps = runs[run]
    shown = _thinned(len(steps.tokens))
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.1)
    of_mtp = [("beta", "β, weight of MTP", "#c4620e", 1)] if steps.has("mtp_lm") or steps.has("mtp_kd") else []
    for field, name, colour, row in (
        ("lambda", "λ, weight of KD", "#2271d1", 1),
        *of_mtp,
        ("learning_rate", "learning rate", "#2a8767", 2),
    ):
        figure.add_scatter(
            x=steps.along[axis][shown].astype(np.float32),
            y=steps.values[field][shown].astype(np.float32),
            mode="lines",
            line={"color": colour, "width": 2.2},
            name=name,
            row=row,
            col=1,
            hovertemplate="%{y:.3g}",
        )
    _finish(figure, {run: steps}, axis)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title="weight", range=[0, 1.05], row=1)
    figure.update_yaxes(title="learning rate", tickformat="~g", row=2)
    figure.update_xaxes(title=None, row=1)
    return styled(figure, height=360, legend=True, compare=True)


def _add_measured(
    figure: go.Figure, steps: Steps, field: str, axis: str, mode: str, line: dict[str, str], name: str, symbol: str
) -> None:
    """Add the few steps at which `field` was measured."""
    measured = np.flatnonzero(np.isfinite(steps.values[field]))
    look: dict[str, Any] = {"marker": {"color": line["color"], "size": 6, "symbol": symbol}}
    if mode != "markers":
        look["line"] = line | {"width": 1.5}
    figure.add_scatter(
        x=steps.along[axis][measured].astype(np.float32),
        y=steps.values[field][measured].astype(np.float32),
        mode=mode,
        name=name,
        hovertemplate="%{y:,.4~g}",
        **look,
    )


def _finish(figure: go.Figure, runs: Mapping[str, Steps], axis: str) -> None:
    """Label the axis, and draw a dashed line at each boundary of stages, i.e. at each cut."""
    figure.update_xaxes(title=AXES[axis], tickformat="~s" if axis == "tokens" else "~g", rangemode="tozero")
    starts: dict[float, int] = {}
    for steps in runs.values():
        for index in np.flatnonzero(np.diff(steps.stage)):
            starts[float(steps.along[axis][index])] = int(steps.stage[index + 1])
    agree = len(set(starts.values())) == len(starts)  # else labels would overlap
    for place, stage in starts.items():
        figure.add_vline(x=place, line={"color": CUT, "dash": "dash", "width": 1.2})
        if not agree:
            continue
        figure.add_annotation(
            x=place,
            y=1,
            yref="paper",
            text=f"stage {stage}",
            showarrow=False,
            xanchor="left",
            yanchor="bottom",
            xshift=-3,
        )


def _smoothed(values: Column, stage: Column) -> Column:
    """Compute the centred moving mean over a 25th of the run, within each stage, since the loss jumps at a boundary.

    A step without a value stays NaN, and is ignored in the means of its neighbours.
    """
    width = max(1, len(values) // 25)
    known = np.isfinite(values)
    smooth = np.full_like(values, np.nan)
    for number in np.unique(stage):
        inside = stage == number
        window = np.ones(min(width, int(inside.sum())))
        sums = np.convolve(np.where(known, values, 0.0)[inside], window, "same")
        counts = np.convolve(known[inside].astype(np.float64), window, "same")
        smooth[inside] = sums / np.maximum(counts, 1.0)
    return np.where(known, smooth, np.nan)


def _thinned(count: int) -> NDArray[np.int64]:
    """Return at most POINTS_PER_CURVE evenly spaced indices below `count`, both ends included."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS_PER_CURVE)).round().astype(np.int64))
