"""Curves as inline SVG that takes its colours from the page, so that it follows light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lalia.plots import smooth

WIDTH, HEIGHT = 320.0, 150.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 8.0, 10.0, 22.0
MOST_POINTS = 240

Points = tuple[Sequence[float], Sequence[float]]


def curves(series: Mapping[str, Points], title: str, across: str = "step") -> str:
    """One small chart. ``series``: label → (positions, values); the n-th has the CSS classes ``line line-n``.

    Lines of 40 points and more are drawn raw (faint) and smoothed; the axis is logarithmic where the values are positive and
    span more than a factor of ten. '' when there is nothing finite to draw.
    """
    kept = {label: _finite(points) for label, points in series.items()}
    kept = {label: points for label, points in kept.items() if len(points[0])}
    if not kept:
        return ""
    xs, ys = (np.concatenate([points[axis] for points in kept.values()]) for axis in (0, 1))
    logarithmic = ys.min() > 0 and ys.max() > 10 * ys.min()
    scale = _Scale((xs.min(), xs.max()), (ys.min(), ys.max()), logarithmic)
    parts = [scale.axes(across)]
    for index, (x, y) in enumerate(kept.values()):
        name = f"line line-{index}"
        if len(y) >= 40:
            parts.append(scale.line(x, y, f"{name} faint"))
            y = smooth(y)
        parts.append(scale.line(x, y, name) if len(y) > 1 else "")
        parts.append(scale.dots(x, y, f"dot dot-{index}") if len(y) < 20 else "")
    label = html.escape(f"{title}: {', '.join(kept)}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


class _Scale:
    """From data to the chart's coordinates."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], logarithmic: bool) -> None:
        self.x, self.y, self.logarithmic = x, y, logarithmic

    def points(self, x: np.ndarray, y: np.ndarray) -> list[str]:
        keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).astype(int))
        across = LEFT + (WIDTH - LEFT - RIGHT) * _share(x[keep], *self.x)
        low, high, values = *self.y, y[keep]
        if self.logarithmic:
            low, high, values = math.log(low), math.log(high), np.log(np.maximum(values, self.y[0]))
        up = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(values, low, high)
        return [f"{a:.1f},{b:.1f}" for a, b in zip(across, up, strict=True)]

    def line(self, x: np.ndarray, y: np.ndarray, name: str) -> str:
        return f'<polyline class="{name}" points="{" ".join(self.points(x, y))}"/>'

    def dots(self, x: np.ndarray, y: np.ndarray, name: str) -> str:
        pairs = (point.split(",") for point in self.points(x, y))
        return "".join(f'<circle class="{name}" cx="{a}" cy="{b}" r="2.6"/>' for a, b in pairs)

    def axes(self, across: str) -> str:
        middle = math.sqrt(self.y[0] * self.y[1]) if self.logarithmic else sum(self.y) / 2
        rows = [(self.y[0], HEIGHT - BOTTOM), (middle, (HEIGHT - BOTTOM + TOP) / 2), (self.y[1], TOP)]
        grid = "".join(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>' for _, y in rows)
        ticks = "".join(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{_short(v)}</text>' for v, y in rows)
        foot = f'<text x="{LEFT}" y="{HEIGHT - 6}">{_short(self.x[0])}</text>' + (
            f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{html.escape(across)} {_short(self.x[1])}</text>'
        )
        return grid + ticks + foot


def _share(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return (values - low) / (high - low) if high > low else np.full(len(values), 0.5)


def _short(value: float) -> str:
    if abs(value) >= 10000:
        return f"{value / 1000:.0f}k"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2g}"


def _finite(points: Points) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(points[0], dtype=np.float64), np.asarray(points[1], dtype=np.float64)
    good = np.isfinite(x) & np.isfinite(y)
    return x[good], y[good]
