"""A chart in the form that the page embeds."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go


@dataclass(frozen=True)
class Chart:
    """A figure with title and caption. `spec` is plotly's JSON: data and layout.

    axes: alternative x axis -> the x of each trace, and the layout.
    """

    title: str
    caption: str
    spec: Any
    axes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, title: str, figure: go.Figure, caption: str) -> "Chart":
        """Make a chart of a figure."""
        return cls(title, caption, json.loads(figure.to_json()))

    @classmethod
    def along(cls, title: str, draw: Callable[..., go.Figure], axes: Sequence[str], caption: str) -> "Chart":
        """Make a chart with a choice of `axes`, the first shown initially. `draw(axis=...)` makes the figure for one."""
        specs = {axis: json.loads(draw(axis=axis).to_json()) for axis in axes}
        alternatives = {
            axis: {"x": [trace["x"] for trace in spec["data"]], "layout": spec["layout"]}
            for axis, spec in specs.items()
        }
        return cls(title, caption, specs[axes[0]], alternatives if len(axes) > 1 else {})
