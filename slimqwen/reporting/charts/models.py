"""Charts that compare models: parameters by part, loss by group of tokens, balance of the experts."""

from collections.abc import Mapping, Sequence
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from slimqwen.families.count import Counts
from slimqwen.reporting.charts.style import lines, part_colours, styled
from slimqwen.reporting.titles import title_of


def parameters(models: Mapping[str, Counts], part_names: Mapping[str, str]) -> go.Figure:
    """Draw a stacked bar of parameters by part per model, the first on top."""
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
    return styled(figure, height=190, legend=False)


def loss_by(models: Mapping[str, Mapping[str, float]], quantity: str) -> go.Figure:
    """Draw a line per model over ordered buckets, with the loss of each in nats per token."""
    figure = go.Figure()
    for name, line in lines(list(models)).items():
        figure.add_scatter(
            x=[escape(bucket) for bucket in models[name]],
            y=list(models[name].values()),
            mode="lines+markers",
            line=line | {"width": 2},
            marker={"size": 6},
            name=escape(title_of(name)),
            hovertemplate="%{y:.3f}",
        )
    figure.update_xaxes(title=quantity, type="category", showgrid=False)
    figure.update_yaxes(title="nats per token")
    return styled(figure, height=340, legend=True, compare=True)


def routing(
    entropy: Mapping[str, Sequence[float]], busiest: Mapping[str, Sequence[float]], layers: Mapping[str, Sequence[str]]
) -> go.Figure:
    """Draw, above, the entropy of the experts' shares over its maximum and, below, the busiest expert's load.

    layers: per model, the position of each of its blocks, as labels of the x axis.
    """
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for name, line in lines(list(layers)).items():
        for row, values in ((1, entropy[name]), (2, busiest[name])):
            figure.add_scatter(
                x=list(layers[name]),
                y=list(values),
                mode="lines+markers",
                line=line | {"width": 2},
                marker={"size": 5},
                name=escape(title_of(name)),
                legendgroup=escape(name),
                showlegend=row == 1,
                row=row,
                col=1,
                hovertemplate="%{y:.3f}" if row == 1 else "%{y:.1f}×",
            )
    order = max(layers.values(), key=len)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=list(order), showgrid=False)
    figure.update_xaxes(title="layer, by its number in the teacher", row=2)
    figure.update_yaxes(title="entropy / its maximum", row=1)
    figure.update_yaxes(title="busiest, × even", row=2, rangemode="tozero")
    return styled(figure, height=400, legend=True, compare=True)
