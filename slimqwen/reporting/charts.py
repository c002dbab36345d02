"""The figures of the report, one function each: numbers in, a plotly Figure out.

Lines and bars have a contrast of at least 3:1 on a light and on a dark page; text and grid lines get theirs
from the page's style sheet, so that they follow the reader's theme.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from slimqwen.families.count import Counts
from slimqwen.planning.experts import ExpertGroup, expert_roles
from slimqwen.reporting.titles import title_of

RUN_COLOURS = {
    "teacher": "#6e7781",
    "pruned": "#8e5bb5",
    "random_init": "#c4620e",
    "lm_only": "#2a8767",
    "slimqwen": "#2271d1",
}
ROLE_COLOURS = {"kept": "#2271d1", "base": "#2a8767", "absorbed": "#c4620e", "dropped": "#79818b"}
KEPT, CUT = ROLE_COLOURS["kept"], ROLE_COLOURS["dropped"]
PART_COLOURS = ["#2271d1", "#c4620e", "#2a8767", "#8e5bb5", "#b3456f", "#8a7000", "#6e7781"]
RARELY_TO_OFTEN = [[0.0, "#9a4f0c"], [0.5, "#d9dde2"], [1.0, "#0b4f9e"]]

POINTS_PER_CURVE = 800  # more than a screen can show apart; keeps the page small after a million steps
LARGEST_MULTIPLE = 3.0  # of the heat-maps' colours, in doublings: 1/8 x to 8 x
ROW_HEIGHT, LARGEST_HEIGHT = 20, 900  # pixels
LOGARITHMIC_SPREAD = 20.0  # scores whose largest is so many times their median are unreadable on a linear axis

Column = NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """What one run logged, a value per optimiser step, NaN where it logged none; `tokens` is cumulative."""

    stage: Column
    tokens: Column
    values: Mapping[str, Column]

    def has(self, field: str) -> bool:
        return bool(np.isfinite(self.values[field]).any())


def parameters(models: Mapping[str, Counts], part_names: Mapping[str, str]) -> go.Figure:
    """A stacked bar per model, the first on top: what its parameters are made of."""
    figure = go.Figure()
    colours = part_colours(list(part_names))
    for part, name in part_names.items():
        figure.add_bar(
            name=escape(name),
            y=list(models),
            x=[counts.parts.get(part, 0) for counts in models.values()],
            orientation="h",
            marker={"color": colours[part], "line": {"width": 0}},
            hovertemplate=f"{escape(name)}: %{{x:,}}<extra>%{{y}}</extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_xaxes(title="parameters", tickformat="~s")
    figure.update_yaxes(showgrid=False, ticksuffix=" ", autorange="reversed")
    return _styled(figure, height=190, legend=False)


def part_colours(parts: Sequence[str]) -> dict[str, str]:
    """The colour of each part in `parameters`, for the legend, which is the table beside it."""
    return {part: PART_COLOURS[index % len(PART_COLOURS)] for index, part in enumerate(parts)}


def learning_curves(runs: Mapping[str, Steps], field: str, quantity: str, *, logarithmic: bool = False) -> go.Figure:
    """One logged quantity of every run against tokens: a moving mean, the raw values faint behind it.

    Diamonds: the same on held-out text, where it was measured during training.
    """
    figure = go.Figure()
    for run, steps in runs.items():
        if not steps.has(field):
            continue
        shown = _thinned(len(steps.tokens))
        line = {"color": RUN_COLOURS.get(run, "#6e7781")}
        tokens, values = steps.tokens[shown], steps.values[field]
        figure.add_scatter(
            x=tokens,
            y=values[shown].astype(np.float32),
            mode="lines",
            line=line | {"width": 1},
            opacity=0.25,
            hoverinfo="skip",
        )
        figure.data[-1].showlegend = False
        figure.add_scatter(
            x=tokens,
            y=_smoothed(values, steps.stage)[shown].astype(np.float32),
            mode="lines",
            line=line | {"width": 2.2},
            name=escape(title_of(run)),
            hovertemplate="%{y:.3f}",
        )
        heldout = steps.values.get(f"heldout_{field}")
        if heldout is not None and np.isfinite(heldout).any():
            measured = np.flatnonzero(np.isfinite(heldout))
            figure.add_scatter(
                x=steps.tokens[measured],
                y=heldout[measured].astype(np.float32),
                mode="markers",
                marker=line | {"size": 6, "symbol": "diamond"},
                name=f"{escape(title_of(run))}, held-out",
                hovertemplate="%{y:.3f}",
            )
    _mark_stages(figure, runs)
    figure.update_xaxes(title="training tokens", tickformat="~s", rangemode="tozero")
    figure.update_yaxes(title=quantity)
    if logarithmic:
        figure.update_yaxes(type="log", dtick="D2", tickformat="~g")
    return _styled(figure, height=360, legend=True, compare=True)


def schedules(runs: Mapping[str, Steps], run: str) -> go.Figure:
    """What the training was told: the weights of the loss terms, and below them the learning rate."""
    steps = runs[run]
    shown = _thinned(len(steps.tokens))
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.1)
    for field, name, colour, row in (
        ("lambda", "λ, weight of KD", "#2271d1", 1),
        ("beta", "β, weight of MTP", "#c4620e", 1),
        ("learning_rate", "learning rate", "#2a8767", 2),
    ):
        line = {"color": colour, "width": 2.2}
        values = steps.values[field][shown].astype(np.float32)
        figure.add_scatter(
            x=steps.tokens[shown],
            y=values,
            mode="lines",
            line=line,
            name=name,
            row=row,
            col=1,
            hovertemplate="%{y:.3g}",
        )
    _mark_stages(figure, runs)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title="weight", range=[0, 1.05], row=1)
    figure.update_yaxes(title="learning rate", tickformat="~g", row=2)
    figure.update_xaxes(tickformat="~s", rangemode="tozero")
    figure.update_xaxes(title="training tokens", row=2)
    return _styled(figure, height=360, legend=True, compare=True)


def layer_scores(scores: Sequence[float], kept: Sequence[int], quantity: str) -> go.Figure:
    """A bar per decoder layer, coloured by whether it stayed."""
    figure = go.Figure()
    layers = set(kept)
    for name, colour, stays in (("kept", KEPT, True), ("dropped", CUT, False)):
        shown = [layer for layer in range(len(scores)) if (layer in layers) == stays]
        figure.add_bar(
            x=shown,
            y=[scores[layer] for layer in shown],
            name=name,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate="layer %{x}: %{y:.4f}",
        )
    figure.update_xaxes(title="decoder layer", dtick=max(1, len(scores) // 12), showgrid=False)
    figure.update_yaxes(title=quantity)
    return _styled(figure, height=320, legend=True)


def width_scores(scores: Sequence[float], kept: Sequence[int]) -> go.Figure:
    """The residual channels from the most to the least important, and where the cut fell."""
    figure = go.Figure()
    channels = sorted(range(len(scores)), key=lambda channel: (-scores[channel], channel))
    stays = set(kept)
    for name, colour, is_kept in (("kept", KEPT, True), ("dropped", CUT, False)):
        ranks = [rank for rank, channel in enumerate(channels) if (channel in stays) == is_kept]
        figure.add_scatter(
            x=np.array(ranks),
            y=np.array([scores[channels[rank]] for rank in ranks]),
            customdata=np.array([channels[rank] for rank in ranks]),
            mode="lines",
            fill="tozeroy",
            line={"color": colour, "width": 2},
            name=f"{name} ({len(ranks):,})",
            hovertemplate="channel %{customdata}: %{y:.4g}",
        )
    figure.add_vline(x=len(kept) - 0.5, line={"color": "#79818b", "dash": "dash", "width": 1.5})
    figure.update_xaxes(title="residual channels, most important first", showgrid=False)
    figure.update_yaxes(title="mean |norm output|")
    if max(scores) > LOGARITHMIC_SPREAD * float(np.median(scores)):
        figure.update_yaxes(type="log", tickformat="~g")
    else:
        figure.update_yaxes(rangemode="tozero")
    return _styled(figure, height=320, legend=True)


def expert_importance(scores: Mapping[str, Sequence[float]]) -> go.Figure:
    """Importance of every expert, layer by layer, as multiples of its layer's mean; most important first."""
    return _multiples_of_even(scores, "importance", "experts, most important first")


def expert_use(shares: Mapping[str, Sequence[float]]) -> go.Figure:
    """Share of the tokens that every expert gets, as multiples of an even share; the busiest first."""
    return _multiples_of_even(shares, "use", "experts, busiest first")


def expert_fates(scores: Mapping[str, Sequence[float]], groups: Mapping[str, Sequence[ExpertGroup]]) -> go.Figure:
    """What became of every expert, in the order of `expert_importance`."""
    order = {block: _descending(scores[block]) for block in groups}
    roles = {block: expert_roles(groups[block], len(scores[block])) for block in groups}
    names = [role for role in ROLE_COLOURS if any(role in found for found in roles.values())]
    figure = _heatmap(
        order,
        {
            block: np.array([names.index(roles[block][expert]) for expert in experts], dtype=np.int8)
            for block, experts in order.items()
        },
        axis="experts, most important first",
        hover="expert %{customdata}",
    )
    bands = []
    for index, name in enumerate(names):  # a flat band of the colour scale per role
        bands += [[index / len(names), ROLE_COLOURS[name]], [(index + 1) / len(names), ROLE_COLOURS[name]]]
        figure.add_scatter(x=[None], y=[None], mode="markers", marker={"color": ROLE_COLOURS[name]}, name=name)
        figure.data[-1].marker.update(symbol="square", size=11)
    figure.update_traces(
        colorscale=bands, zmin=-0.5, zmax=len(names) - 0.5, showscale=False, selector={"type": "heatmap"}
    )
    return _styled(figure, height=figure.layout.height, legend=True)


def _multiples_of_even(shares: Mapping[str, Sequence[float]], quantity: str, axis: str) -> go.Figure:
    """log2 of value / mean per expert, clipped, so that 'twice' and 'half' are equally far from neutral."""
    order = {block: _descending(values) for block, values in shares.items()}

    def doublings(block: str) -> NDArray[np.float32]:
        values = np.asarray(shares[block], dtype=np.float32)[order[block]]
        with np.errstate(divide="ignore"):  # of an expert that was never used: clipped to the rarest colour
            return np.log2(values / (values.mean() or 1.0)).clip(-LARGEST_MULTIPLE, LARGEST_MULTIPLE)

    figure = _heatmap(
        order,
        {block: doublings(block) for block in shares},
        axis=axis,
        hover=f"expert %{{customdata}}: {quantity} 2<sup>%{{z:.1f}}</sup> × the mean",
    )
    figure.update_traces(
        colorscale=RARELY_TO_OFTEN,
        zmin=-LARGEST_MULTIPLE,
        zmax=LARGEST_MULTIPLE,
        colorbar={
            "orientation": "h",
            "y": 1.0,
            "yanchor": "bottom",
            "thickness": 10,
            "len": 0.9,
            "outlinewidth": 0,
            "tickvals": [-3, -2, -1, 0, 1, 2, 3],
            "ticktext": ["≤⅛×", "¼×", "½×", "1×", "2×", "4×", "≥8×"],
        },
    )
    return _styled(figure, height=figure.layout.height, legend=False)


def _heatmap(
    order: Mapping[str, NDArray[np.int16]], values: Mapping[str, NDArray[Any]], *, axis: str, hover: str
) -> go.Figure:
    """A row of `values` per block, first block on top; `order[block]` names the expert in each column."""
    columns = max(len(experts) for experts in order.values())
    figure = go.Figure(
        go.Heatmap(
            z=_padded(list(values.values()), missing=np.nan),
            customdata=_padded(list(order.values()), missing=-1),
            y=[_block_label(block) for block in order],
            x=np.arange(1, columns + 1, dtype=np.int16),
            xgap=1 if columns <= 64 else 0,
            ygap=1,
            hovertemplate=f"layer %{{y}}, {hover}<extra></extra>",
        )
    )
    figure.update_xaxes(title=axis, showgrid=False, zeroline=False, range=[0.5, columns + 0.5])
    figure.update_yaxes(title="layer", autorange="reversed", showgrid=False, type="category")
    if len(order) > 16:
        figure.update_yaxes(dtick=4)
    figure.update_layout(height=min(LARGEST_HEIGHT, 130 + ROW_HEIGHT * len(order)))
    return figure


def _padded(rows: Sequence[NDArray[Any]], *, missing: float) -> NDArray[Any]:
    """The rows under one another, `[rows, longest row]`, in their dtype, `missing` where a row is shorter."""
    lengths = [len(row) for row in rows]
    if len(set(lengths)) == 1:
        return np.stack(rows)
    table = np.full((len(rows), max(lengths)), missing, dtype=rows[0].dtype)
    for line, values in zip(table, rows, strict=True):
        line[: len(values)] = values
    return table


def _block_label(block: str) -> str:
    """ "model.layers.3" -> "3"; the multi-token-prediction module's blocks -> "MTP"."""
    return "MTP" if block.startswith("mtp.") else escape(block.rpartition(".")[2])


def _descending(scores: Sequence[float]) -> NDArray[np.int16]:
    """Indices from the highest score to the lowest, the lower index first on a tie, as plans rank."""
    return np.argsort(-np.asarray(scores), kind="stable").astype(np.int16)


def _mark_stages(figure: go.Figure, runs: Mapping[str, Steps]) -> None:
    """A dashed line wherever a run went over to its next stage, i.e. where something was cut."""
    starts: dict[float, int] = {}
    for steps in runs.values():
        for index in np.flatnonzero(np.diff(steps.stage)):
            starts[float(steps.tokens[index])] = int(steps.stage[index + 1])
    for tokens, stage in starts.items():
        figure.add_vline(x=tokens, line={"color": "#79818b", "dash": "dash", "width": 1.2})
        figure.add_annotation(
            x=tokens,
            y=1,
            yref="paper",
            text=f"stage {stage}",
            showarrow=False,
            xanchor="left",
            yanchor="bottom",
            xshift=-3,
        )


def _smoothed(values: Column, stage: Column) -> Column:
    """Centred moving mean over a 25th of the run; never across a stage boundary, where the loss jumps."""
    width = max(1, len(values) // 25)
    smooth = np.empty_like(values)
    for number in np.unique(stage):
        inside = stage == number
        window = np.ones(min(width, int(inside.sum())))
        smooth[inside] = np.convolve(values[inside], window, "same") / np.convolve(
            np.ones(int(inside.sum())), window, "same"
        )
    return smooth


def _thinned(count: int) -> NDArray[np.int64]:
    """At most POINTS_PER_CURVE evenly spaced indices below `count`, both ends included."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS_PER_CURVE)).round().astype(np.int64))


def _styled(figure: go.Figure, *, height: int, legend: bool, compare: bool = False) -> go.Figure:
    """`compare`: one hover label for all curves at the same place."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 14, "t": 14, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        showlegend=legend,
        legend={"orientation": "h", "x": 0, "y": 1.08, "yanchor": "bottom", "traceorder": "normal"},
        hovermode="x unified" if compare else "closest",
        dragmode=False,  # a finger on a chart scrolls the page
    )
    figure.update_xaxes(zeroline=False, automargin=True, title_standoff=8, showspikes=False)
    figure.update_yaxes(zeroline=False, automargin=True, title_standoff=8)
    return figure
