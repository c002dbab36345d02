"""The two figures of a study's page as inline SVG. With plotly.js each page in the repository would take 4.8 MB more."""

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10

from markupsafe import Markup

WIDTH, LEFT, RIGHT, BOTTOM, TOP = 960, 60, 20, 44, 14
COLOURS = ("#2271d1", "#c4620e", "#2a8767", "#8e5bb5", "#b3456f", "#8a7000", "#6e7781")
DASHES = ("", "8 4", "2 4")
ROW, LEGEND_ROW = 42, 20

Interval = tuple[float, float, float]
"""Mean, and the two ends of its confidence interval."""


def intervals(rows: Mapping[str, Interval], axis: str) -> Markup:
    """Draw a dot with its interval per row, its title above it, and a dashed line at zero."""
    low, high = min(0.0, *(row[1] for row in rows.values())), max(0.0, *(row[2] for row in rows.values()))
    margin = 0.04 * (high - low) or 1.0
    x = _Scale(low - margin, high + margin, LEFT, WIDTH - RIGHT)
    height = TOP + ROW * len(rows) + BOTTOM
    parts = _vertical_grid(x, height, axis)
    parts.append(f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{TOP}" y2="{height - BOTTOM}" class="zero"/>')
    for number, (title, (mean, left, right)) in enumerate(rows.items()):
        y = TOP + ROW * (number + 0.75)
        parts.append(
            f'<g><text x="{LEFT}" y="{y - 12}">{escape(title)}</text>'
            f'<path d="M{x(left):.1f} {y}H{x(right):.1f}M{x(left):.1f} {y - 5}v10M{x(right):.1f} {y - 5}v10" '
            f'stroke="{COLOURS[0]}" stroke-width="1.5" fill="none"/>'
            f'<circle cx="{x(mean):.1f}" cy="{y}" r="4.5" fill="{COLOURS[0]}"/></g>'
        )
    return _svg(height, parts)


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], x_axis: str, y_axis: str) -> Markup:
    """Draw a line of (x, y) points per name, with a legend below. The x axis begins at 0."""
    points = [point for line in lines.values() for point in line]
    height = TOP + 340 + BOTTOM
    x = _Scale(0.0, max(point[0] for point in points), LEFT, WIDTH - RIGHT)
    y = _Scale(min(point[1] for point in points), max(point[1] for point in points), height - BOTTOM, TOP + 6)
    parts = _vertical_grid(x, height, x_axis)
    for tick in y.ticks():
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="grid"/>'
            f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{_tick_label(tick)}</text>'
        )
    parts.append(
        f'<text transform="translate(14 {height / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(y_axis)}</text>'
    )
    for number, (name, line) in enumerate(lines.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line)
        legend = height + LEGEND_ROW * (number + 0.5)
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}" fill="none"'
        parts.append(
            f'<g><title>{escape(name)}</title><path d="{path}" {stroke}/>'
            f'<path d="M{LEFT} {legend}h28" {stroke}/><text x="{LEFT + 36}" y="{legend + 4}">{escape(name)}</text></g>'
        )
    return _svg(height + LEGEND_ROW * len(lines) + 6, parts)


class _Scale:
    """Linear map from values to pixels."""

    def __init__(self, low: float, high: float, first_pixel: float, last_pixel: float) -> None:
        self.low, self.high = low, high if high > low else low + 1.0
        self.first_pixel, self.last_pixel = first_pixel, last_pixel

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.first_pixel + share * (self.last_pixel - self.first_pixel)

    def ticks(self) -> list[float]:
        """Return between four and ten round numbers within the range."""
        raw = (self.high - self.low) / 5
        power = 10.0 ** floor(log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.8)
        first = ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, floor(self.high / step + 1e-9) + 1)]


def _vertical_grid(x: _Scale, height: float, axis: str) -> list[str]:
    """Draw grid lines at the ticks of x, their labels and the axis title."""
    bottom = height - BOTTOM
    parts = [
        f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>'
        f'<text x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{_tick_label(tick)}</text>'
        for tick in x.ticks()
    ]
    middle = (x.first_pixel + x.last_pixel) / 2
    return [*parts, f'<text x="{middle:.0f}" y="{bottom + 37}" text-anchor="middle">{escape(axis)}</text>']


def _tick_label(value: float) -> str:
    """Format a tick: `20k` from 10,000 on."""
    return f"{value / 1000:,.0f}k" if abs(value) >= 10_000 else f"{value:g}" if abs(value) > 1e-12 else "0"


def _svg(height: float, parts: list[str]) -> Markup:
    """Join the parts to one SVG element."""
    return Markup(  # titles and axes were escaped above
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" xmlns="http://www.w3.org/2000/svg" class="drawing">{"".join(parts)}</svg>'
    )
