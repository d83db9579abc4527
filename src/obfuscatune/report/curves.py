"""Line charts as inline SVG: axes, ticks, grid and legend, coloured by the page's style sheet for light and dark."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from obfuscatune.report.ticks import Axis, linear_axis, log_axis

WIDTH, HEIGHT = 540, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 48, 48
_COLOURS = 4

STYLE = """
.chart { width: 100%; height: auto; display: block; }
.chart text { font-size: 13px; fill: var(--quiet); }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .axis { stroke: var(--quiet); stroke-width: 1; }
.chart .curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .wide { stroke-width: 8; stroke-opacity: 0.4; }
.chart .mark { stroke: none; }
.chart .s0 { stroke: var(--s0); } .chart .s1 { stroke: var(--s1); }
.chart .s2 { stroke: var(--s2); } .chart .s3 { stroke: var(--s3); }
.chart .mark.s0 { fill: var(--s0); } .chart .mark.s1 { fill: var(--s1); }
.chart .mark.s2 { fill: var(--s2); } .chart .mark.s3 { fill: var(--s3); }
"""
"""Rules for the charts; the page defines --quiet, --line and --s0 to --s3."""


@dataclass(frozen=True)
class Series:
    """One curve: points (x, y). A `wide` one is a pale band, on which another that coincides with it can be seen."""

    label: str
    points: tuple[tuple[float, float], ...]
    wide: bool = False


def line_chart(series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_y: bool = False) -> str:
    """An `<svg>` element of several curves.

    Points that are not finite, and on a logarithmic axis those that are not positive, are left out, and the curve
    is interrupted there; a point that stands alone is drawn as a dot.

    Args:
        title: read out by screen readers.
        x_label, y_label: what the axes count, with the unit.
    """
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    x_axis = linear_axis(xs, wanted=8, whole=all(x == int(x) for x in xs), tight=True)
    frame = _Frame(x_axis, log_axis(ys) if log_y else linear_axis(ys))
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_axes(frame, x_label, y_label),
        *_legend(series),
    ]
    for index, one in enumerate(series):
        parts += _curve(frame, one, index)
    parts.append("</svg>")
    return "\n".join(parts)


@dataclass(frozen=True)
class _Frame:
    """From values to places in the picture."""

    x_axis: Axis
    y_axis: Axis

    def x(self, value: float) -> float:
        return round(_LEFT + self.x_axis.place(value) * (WIDTH - _LEFT - _RIGHT), 2)

    def y(self, value: float) -> float:
        return round(HEIGHT - _BOTTOM - self.y_axis.place(value) * (HEIGHT - _TOP - _BOTTOM), 2)

    def shows(self, point: tuple[float, float]) -> bool:
        return all(map(math.isfinite, point)) and (point[1] > 0 or not self.y_axis.log)


def _axes(frame: _Frame, x_label: str, y_label: str) -> Iterator[str]:
    floor, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for value, label in frame.y_axis.ticks:
        y = frame.y(value)
        yield f'<line class="grid" x1="{_LEFT}" y1="{y}" x2="{right}" y2="{y}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(label)}</text>'
    for value, label in frame.x_axis.ticks:
        x = frame.x(value)
        yield f'<line class="axis" x1="{x}" y1="{floor}" x2="{x}" y2="{floor + 5}"/>'
        yield f'<text x="{x}" y="{floor + 19}" text-anchor="middle">{escape(label)}</text>'
    yield f'<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{right}" y2="{floor}"/>'
    yield f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    yield f'<text x="0" y="18">{escape(y_label)}</text>'


def _legend(series: Sequence[Series]) -> Iterator[str]:
    """In the top right corner: each label before a stroke of its curve."""
    end = float(WIDTH - _RIGHT)
    for index, one in reversed(list(enumerate(series))):
        yield f'<line class="{_classes(one, index)}" x1="{end - 20:.0f}" y1="14" x2="{end:.0f}" y2="14"/>'
        yield f'<text x="{end - 28:.0f}" y="18" text-anchor="end">{escape(one.label)}</text>'
        end -= 28 + 7.5 * len(one.label) + 18  # a letter is about so wide


def _curve(frame: _Frame, one: Series, index: int) -> Iterator[str]:
    for shown, stretch in groupby(one.points, key=frame.shows):
        if not shown:
            continue
        places = [(frame.x(x), frame.y(y)) for x, y in stretch]
        if len(places) == 1:
            yield f'<circle class="mark s{index % _COLOURS}" cx="{places[0][0]}" cy="{places[0][1]}" r="2"/>'
        else:
            points = " ".join(f"{x},{y}" for x, y in places)
            yield f'<polyline class="{_classes(one, index)}" points="{points}"/>'


def _classes(one: Series, index: int) -> str:
    return f"curve s{index % _COLOURS}{' wide' if one.wide else ''}"
