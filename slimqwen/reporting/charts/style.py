"""The common style of all figures: colours, sizes, a layout with a transparent background."""

from collections.abc import Sequence

import plotly.graph_objects as go

RUN_COLOURS = {
    "teacher": "#6e7781",
    "pruned": "#8e5bb5",
    "random_init": "#c4620e",
    "lm_only": "#2a8767",
    "paper": "#b3456f",
    "paper_pruned": "#8a7000",
    "slimqwen": "#2271d1",
}
ROLE_COLOURS = {"kept": "#2271d1", "base": "#2a8767", "absorbed": "#c4620e", "dropped": "#79818b"}
KEPT, CUT = ROLE_COLOURS["kept"], ROLE_COLOURS["dropped"]
PART_COLOURS = ["#2271d1", "#c4620e", "#2a8767", "#8e5bb5", "#b3456f", "#8a7000", "#6e7781"]
DASHES = ("solid", "dash", "dot")
MARK = {"color": CUT, "dash": "dash", "width": 1.5}  # the line of a boundary


def lines(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the line style of each model: the models of a run have fixed colours, others get one each."""
    found = {}
    for index, name in enumerate(names):
        colour = RUN_COLOURS.get(name, PART_COLOURS[index % len(PART_COLOURS)])
        dash = DASHES[0 if name in RUN_COLOURS else index // len(PART_COLOURS) % len(DASHES)]
        found[name] = {"color": colour, "dash": dash}
    return found


def part_colours(parts: Sequence[str]) -> dict[str, str]:
    """Return the colour of each part of a model, for a chart and the table beside it, which is its legend."""
    return {part: PART_COLOURS[index % len(PART_COLOURS)] for index, part in enumerate(parts)}


def styled(figure: go.Figure, *, height: int, legend: bool, compare: bool = False) -> go.Figure:
    """Apply the common style. compare: one hover label for all curves at the same x."""
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
