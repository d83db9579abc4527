"""Line and bar charts as SVG, for an HTML page or as files. Style sheets give the colours, for light and dark.

Chart, Bars  ->  axes with ticks at round numbers, legend  ->  _Frame: values to pixels  ->  SVG elements
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import ClassVar, Literal, NamedTuple

from obfuscatune.report.axes import Axis, linear_axis, log_axis, named_axis
from obfuscatune.report.page import templates

WIDTH, HEIGHT = 540, 290
"""Of a chart in pixels, if its legend takes one line."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 48, 48
"""Margins around the plot area in pixels."""
_COLOURS = 8
_LETTER = 7.5
"""Approximate width of a letter in pixels."""
_LEGEND_LINE = 20
"""Height of a line of the legend in pixels."""
_SLANT = 25
"""Degrees by which names on the x axis are turned if they do not fit side by side."""

Line = Literal["solid", "dashed", "dotted", "thin", "none"]


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: in the legend; a series with an empty label is left out of it.
        points: (x, y) of each point.
        wide: draw a wide pale line, on which another curve with the same points can be seen.
        marks: draw a dot at each point.
        colour: number of the colour, from 0; None for the index of the series in its chart.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    wide: bool = False
    marks: bool = False
    line: Line = "solid"
    colour: int | None = None


class Band(NamedTuple):
    """A range of y that is shaded behind the curves."""

    label: str
    low: float
    high: float


class Bar(NamedTuple):
    """One bar, which begins at zero, or on the bar below if stacked. `spread`: length of the whisker to either side."""

    height: float
    spread: float = 0.0


@dataclass(frozen=True)
class Chart:
    """A line chart.

    Points that are not finite are left out, and on a logarithmic axis those that are not positive. The curve is
    interrupted there. A point without neighbours is drawn as a dot.

    Attributes:
        from_zero: the y axis begins at 0.
        x_names: names of x = 0, 1, 2, …; empty for a numeric axis.
        caption: text below the chart, for the page.
    """

    kind: ClassVar[str] = "chart"
    heading: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    caption: str = ""
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False
    x_names: Sequence[str] = ()
    band: Band | None = None

    def svg(self, *, alone: bool = False) -> str:
        """An `<svg>` element, or a file of its own."""
        xs = [x for one in self.series for x, _ in one.points]
        ys = [y for one in self.series for _, y in one.points] + ([0.0] if self.from_zero else [])
        ys += [self.band.low, self.band.high] if self.band else []
        if self.x_names:
            x_axis = named_axis(self.x_names)
        elif self.log_x:
            x_axis = log_axis(xs)
        else:
            x_axis = linear_axis(xs, wanted=8, whole=all(x == int(x) for x in xs), tight=True)
        keys = [
            _Key(one.label, "mark" if one.line == "none" else "curve", _line_classes(one, index))
            for index, one in enumerate(self.series)
            if one.label
        ]
        keys += [_Key(self.band.label, "band", "")] if self.band else []
        frame = _Frame(x_axis, log_axis(ys) if self.log_y else linear_axis(ys), _Legend(self.y_label, keys))
        return _picture(self.heading, frame, self.x_label, self._marks(frame), alone=alone)

    def _marks(self, frame: "_Frame") -> Iterator[str]:
        if self.band is not None:
            top, bottom = frame.y(self.band.high), frame.y(self.band.low)
            yield _tag("rect", "band", x=_LEFT, y=top, width=WIDTH - _LEFT - _RIGHT, height=round(bottom - top, 2))
        for index, one in enumerate(self.series):
            yield from _curve(frame, one, index)


@dataclass(frozen=True)
class Bars:
    """A bar chart.

    Attributes:
        categories: names on the x axis.
        groups: by label, the bar of each category; None for no bar. Groups stand side by side, or are `stacked`.
        least: a label, and for each category the height of a dashed line.
    """

    kind: ClassVar[str] = "chart"
    heading: str
    categories: Sequence[str]
    groups: Mapping[str, Sequence[Bar | None]]
    y_label: str
    caption: str = ""
    stacked: bool = False
    least: tuple[str, Sequence[float]] | None = None

    def svg(self, *, alone: bool = False) -> str:
        """An `<svg>` element, or a file of its own."""
        keys = [_Key(label, "mark", _colour(index)) for index, label in enumerate(self.groups)]
        keys += [_Key(self.least[0], "least", "")] if self.least else []
        bars = list(self._placed())
        highest = [0.0, *(bottom + bar.height + bar.spread for _, _, bottom, _, bar in bars)]
        y_axis = linear_axis([*highest, *(self.least[1] if self.least else ())])
        frame = _Frame(named_axis(self.categories), y_axis, _Legend(self.y_label, keys))
        return _picture(self.heading, frame, "", self._marks(frame, bars), alone=alone)

    def _placed(self) -> Iterator[tuple[float, float, float, int, Bar]]:
        """Yield (left, right, bottom, group, bar) for each bar, in units of the axes."""
        width = 0.6 if self.stacked else 0.8 / len(self.groups)
        first = -0.3 if self.stacked else -0.4
        bottoms = [0.0] * len(self.categories)
        for group, bars in enumerate(self.groups.values()):
            for place, bar in enumerate(bars):
                if bar is None:
                    continue
                left = place + first + (0 if self.stacked else group * width)
                yield left, left + width, bottoms[place], group, bar
                bottoms[place] += bar.height if self.stacked else 0.0

    def _marks(self, frame: "_Frame", bars: Sequence[tuple[float, float, float, int, Bar]]) -> Iterator[str]:
        for left, right, bottom, group, bar in bars:
            x, top, floor = frame.x(left), frame.y(bottom + bar.height), frame.y(bottom)
            size = {"width": round(frame.x(right) - x, 2), "height": round(floor - top, 2)}
            yield _tag("rect", f"mark {_colour(group)}", x=x, y=top, **size)
            if bar.spread:
                middle, ends = frame.x((left + right) / 2), (bar.height - bar.spread, bar.height + bar.spread)
                yield _tag("line", "whisker", x1=middle, y1=frame.y(ends[0]), x2=middle, y2=frame.y(ends[1]))
        for place, height in enumerate(self.least[1] if self.least else ()):
            y = frame.y(height)
            yield _tag("line", "least", x1=frame.x(place - 0.38), y1=y, x2=frame.x(place + 0.38), y2=y)


class _Key(NamedTuple):
    """An entry of the legend: a label, the shape drawn before it, and that shape's CSS classes."""

    label: str
    shape: Literal["curve", "mark", "band", "least"]
    classes: str

    @property
    def width(self) -> float:
        return 28 + _LETTER * len(self.label) + 18


class _Legend:
    """The lines above the plot: the label of the y axis at the left, the entries of the legend at the right."""

    def __init__(self, y_label: str, keys: Sequence[_Key]) -> None:
        self._y_label = y_label
        self._lines: list[list[_Key]] = [[]]
        space = WIDTH - _RIGHT - _LETTER * len(y_label)
        for key in keys:
            if self._lines[-1] and sum(it.width for it in self._lines[-1]) + key.width > space:
                self._lines.append([])
                space = WIDTH - _RIGHT
            self._lines[-1].append(key)

    @property
    def extra_height(self) -> int:
        """Pixels that the lines after the first one take."""
        return _LEGEND_LINE * (len(self._lines) - 1)

    def elements(self) -> Iterator[str]:
        yield _tag("text", "", self._y_label, x=0, y=18)
        for number, line in enumerate(self._lines):
            end, middle = float(WIDTH - _RIGHT), 14 + _LEGEND_LINE * number
            for key in reversed(line):
                classes = f"{key.shape} {key.classes}".strip()
                if key.shape in ("curve", "least"):
                    yield _tag("line", classes, x1=round(end - 20), y1=middle, x2=round(end), y2=middle)
                else:
                    yield _tag("rect", classes, x=round(end - 16), y=middle - 5, width=12, height=10)
                yield _tag("text", "", key.label, x=round(end - 28), y=middle + 4, text_anchor="end")
                end -= key.width


@dataclass(frozen=True)
class _Frame:
    """Converts values on the axes to pixels."""

    x_axis: Axis
    y_axis: Axis
    legend: _Legend

    @property
    def slanted(self) -> bool:
        """Whether the names on the x axis do not fit side by side."""
        space = (WIDTH - _LEFT - _RIGHT) / max(1, len(self.x_axis.ticks))
        return self.x_axis.named and self._longest_name > space

    @property
    def _longest_name(self) -> float:
        return _LETTER * max((len(label) for _, label in self.x_axis.ticks), default=0)

    @property
    def bottom(self) -> int:
        """Height of the margin below the plot area."""
        return _BOTTOM + (round(self._longest_name * math.sin(math.radians(_SLANT))) if self.slanted else 0)

    @property
    def height(self) -> int:
        return HEIGHT + self.legend.extra_height + self.bottom - _BOTTOM

    def x(self, value: float) -> float:
        return round(_LEFT + self.x_axis.place(value) * (WIDTH - _LEFT - _RIGHT), 2)

    def y(self, value: float) -> float:
        return round(self.height - self.bottom - self.y_axis.place(value) * (HEIGHT - _TOP - _BOTTOM), 2)

    def shows(self, point: tuple[float, float]) -> bool:
        """Whether a point can be drawn: finite, and positive on a logarithmic axis."""
        pairs = zip(point, (self.x_axis, self.y_axis), strict=True)
        return all(math.isfinite(value) and (value > 0 or not axis.log) for value, axis in pairs)


def _picture(title: str, frame: _Frame, x_label: str, marks: Iterator[str], *, alone: bool) -> str:
    parts = [*_axes(frame, x_label), *frame.legend.elements(), *marks]
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    style = f"<style>\n{templates().get_template('picture.css').render()}</style>\n" if alone else ""
    head = (
        f'<svg{namespace} class="chart" viewBox="0 0 {WIDTH} {frame.height}" role="img" aria-label="{escape(title)}">'
    )
    return "\n".join([head, style + "\n".join(parts), "</svg>"])


def _axes(frame: _Frame, x_label: str) -> Iterator[str]:
    floor, right = frame.height - frame.bottom, WIDTH - _RIGHT
    for value, label in frame.y_axis.ticks:
        y = frame.y(value)
        yield _tag("line", "grid", x1=_LEFT, y1=y, x2=right, y2=y)
        yield _tag("text", "", label, x=_LEFT - 8, y=y + 4, text_anchor="end")
    for value, label in frame.x_axis.ticks:
        x = frame.x(value)
        yield _tag("line", "axis", x1=x, y1=floor, x2=x, y2=floor + 5)
        turned = {"text_anchor": "end", "transform": f"rotate(-{_SLANT} {x} {floor + 19})"}
        yield _tag("text", "", label, x=x, y=floor + 19, **(turned if frame.slanted else {"text_anchor": "middle"}))
    yield _tag("line", "axis", x1=_LEFT, y1=floor, x2=right, y2=floor)
    yield _tag("text", "", x_label, x=(_LEFT + right) / 2, y=frame.height - 8, text_anchor="middle")


def _curve(frame: _Frame, series: Series, index: int) -> Iterator[str]:
    """The elements of a series: a polyline for each run of points that can be drawn, and dots."""
    colour = _series_colour(series, index)
    for shown, run in groupby(series.points, key=frame.shows):
        if not shown:
            continue
        places = [(frame.x(x), frame.y(y)) for x, y in run]
        if len(places) > 1 and series.line != "none":
            points = " ".join(f"{x},{y}" for x, y in places)
            yield _tag("polyline", f"curve {_line_classes(series, index)}", points=points)
        if len(places) == 1 or series.marks:
            yield from (_tag("circle", f"mark {colour}", cx=x, cy=y, r=3 if series.marks else 2) for x, y in places)


def _line_classes(series: Series, index: int) -> str:
    classes = [_series_colour(series, index), *(["wide"] if series.wide else [])]
    return " ".join(classes if series.line in ("solid", "none") else [*classes, series.line])


def _series_colour(series: Series, index: int) -> str:
    return _colour(index if series.colour is None else series.colour)


def _colour(index: int) -> str:
    """The CSS class of a colour. After the last colour they begin again, paler."""
    return f"s{index % _COLOURS}" + (" pale" if index >= _COLOURS else "")


def _tag(name: str, classes: str, text: str = "", /, **attributes: object) -> str:
    """An SVG element with escaped text and attributes; `_` in an attribute's name becomes a dash."""
    given = {"class": classes, **attributes} if classes else attributes
    pairs = "".join(f' {key.replace("_", "-")}="{escape(str(value))}"' for key, value in given.items())
    return f"<{name}{pairs}>{escape(text)}</{name}>" if text else f"<{name}{pairs}/>"
