"""Heat maps with a cell for every expert of every layer: importance, role in the cut, use."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from slimqwen.planning.experts import ExpertGroup, expert_roles
from slimqwen.reporting.charts.style import ROLE_COLOURS, styled

RARELY_TO_OFTEN = [[0.0, "#9a4f0c"], [0.5, "#d9dde2"], [1.0, "#0b4f9e"]]
FEW_TO_MANY = [[0.0, "#d9dde2"], [0.5, "#5d97d6"], [1.0, "#08396f"]]
LARGEST_MULTIPLE = 3.0  # range of the heat maps' colours, in doublings: 1/8 x to 8 x
COLORBAR = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "thickness": 10, "len": 0.9, "outlinewidth": 0}
ROW_HEIGHT, LARGEST_HEIGHT = 20, 900  # pixels


def expert_importance(scores: Mapping[str, Sequence[float]]) -> go.Figure:
    """Draw the importance of every expert by layer, as multiples of the layer's mean, in descending order."""
    return _multiples_of_mean(scores, "importance", "experts, most important first")


def expert_use(shares: Mapping[str, Sequence[float]]) -> go.Figure:
    """Draw every expert's share of the tokens, as multiples of an even share, in descending order."""
    return _multiples_of_mean(shares, "use", "experts, busiest first")


def expert_fates(scores: Mapping[str, Sequence[float]], groups: Mapping[str, Sequence[ExpertGroup]]) -> go.Figure:
    """Draw the role of every expert (kept, base, absorbed, dropped), in the order of `expert_importance`."""
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
    return styled(figure, height=figure.layout.height, legend=True)


def merge_groups(groups: Mapping[str, Sequence[ExpertGroup]]) -> go.Figure:
    """Draw the number of members of each group, in descending order; hovering lists them."""
    largest_first = {
        block: sorted(found, key=lambda group: (-len(group.members), group.base)) for block, found in groups.items()
    }
    sizes = {
        block: np.array([len(group.members) for group in found], np.int16) for block, found in largest_first.items()
    }
    columns = max(map(len, sizes.values()))
    members = [[_listed(group) for group in found] + [""] * (columns - len(found)) for found in largest_first.values()]
    bases = {block: np.array([group.base for group in found], np.int16) for block, found in largest_first.items()}
    figure = _heatmap(bases, sizes, axis="experts of the result, most members first", hover="%{text}")
    figure.update_traces(
        text=members,
        colorscale=FEW_TO_MANY,
        zmin=1,
        colorbar={
            **COLORBAR,
            "tickformat": "d",
            "title": {"text": "members", "side": "top"},
        },
    )
    figure.update_traces(customdata=None)
    return styled(figure, height=figure.layout.height, legend=False)


def _listed(group: ExpertGroup) -> str:
    """Format a group: `17 + 3, 40`, the base, then at most eight of those that it absorbed."""
    absorbed = [str(expert) for expert in group.members[1:9]]
    more = len(group.members) - 9
    return (
        str(group.base) + (" + " + ", ".join(absorbed) if absorbed else "") + (f" and {more} more" if more > 0 else "")
    )


def _multiples_of_mean(shares: Mapping[str, Sequence[float]], quantity: str, axis: str) -> go.Figure:
    """Draw log2 of value / mean per expert, clipped, so that twice and half have symmetric colours."""
    order = {block: _descending(values) for block, values in shares.items()}

    def doublings(block: str) -> NDArray[np.float32]:
        values = np.asarray(shares[block], dtype=np.float32)[order[block]]
        with np.errstate(divide="ignore"):  # an expert that was never used is clipped to the lowest colour
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
            **COLORBAR,
            "tickvals": [-3, -2, -1, 0, 1, 2, 3],
            "ticktext": ["≤⅛×", "¼×", "½×", "1×", "2×", "4×", "≥8×"],
        },
    )
    return styled(figure, height=figure.layout.height, legend=False)


def _heatmap(
    order: Mapping[str, NDArray[np.int16]], values: Mapping[str, NDArray[Any]], *, axis: str, hover: str
) -> go.Figure:
    """Draw a row of `values` per block, the first on top; `order[block]` has the expert in each column."""
    columns = max(len(experts) for experts in order.values())
    figure = go.Figure(
        go.Heatmap(
            z=_padded(list(values.values()), missing=np.nan),
            customdata=_padded(list(order.values()), missing=-1),
            y=[block_label(block) for block in order],
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
    """Stack rows into `[rows, longest row]`, in their dtype, padded with `missing`."""
    lengths = [len(row) for row in rows]
    if len(set(lengths)) == 1:
        return np.stack(rows)
    table = np.full((len(rows), max(lengths)), missing, dtype=rows[0].dtype)
    for line, values in zip(table, rows, strict=True):
        line[: len(values)] = values
    return table


def block_label(block: str) -> str:
    """Return a block's label: "model.layers.3" -> "3"; the MTP module's blocks -> "MTP"."""
    return "MTP" if block.startswith("mtp.") else escape(block.rpartition(".")[2])


def _descending(scores: Sequence[float]) -> NDArray[np.int16]:
    """Return indices in descending order of score, the lower index first on a tie, as in plans."""
    return np.argsort(-np.asarray(scores), kind="stable").astype(np.int16)
