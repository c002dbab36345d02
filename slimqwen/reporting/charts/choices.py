"""Charts of the scores of layers and channels, coloured by whether they were kept."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from slimqwen.reporting.charts.style import CUT, KEPT, MARK, styled

LOGARITHMIC_SPREAD = 20.0  # maximum over median beyond which scores are unreadable on a linear axis


def layer_scores(scores: Sequence[float], kept: Sequence[int], quantity: str) -> go.Figure:
    """Draw a bar per decoder layer, coloured by whether it was kept."""
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
    return styled(figure, height=320, legend=True)


def width_scores(scores: Sequence[float], kept: Sequence[int], unit: str, quantity: str) -> go.Figure:
    """Draw the scores of the residual stream's channels or directions (`unit`) in descending order, and mark the cut."""
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
            hovertemplate=f"{unit.removesuffix('s')} %{{customdata}}: %{{y:.4g}}",
        )
    figure.add_vline(x=len(kept) - 0.5, line=MARK)
    figure.update_xaxes(title=f"residual {unit}, most important first", showgrid=False)
    figure.update_yaxes(title=quantity)
    if max(scores) > LOGARITHMIC_SPREAD * float(np.median(scores)):
        figure.update_yaxes(type="log", tickformat="~g")
    else:
        figure.update_yaxes(rangemode="tozero")
    return styled(figure, height=320, legend=True)
