"""Line and bar charts as SVG, for a page or as files of their own: coloured by style sheets for light and dark.

Axes have their marks at round numbers.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import ClassVar, Literal, NamedTuple

from obfuscatune.report.page import templates

_MOST_DECADES = 7


@dataclass(frozen=True)
class Axis:
    """A range of values that holds all of them and begins and ends at a tick or close to one.

    Attributes:
        low, high: the range; positive on a logarithmic axis.
        ticks: positions of the marks, within the range, and their labels.
        named: whether the labels are names, one for each whole number.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool
    named: bool = False

    def place(self, value: float) -> float:
        """Where a value lies between low (0) and high (1)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(values: Iterable[float], *, wanted: int = 5, whole: bool = False, tight: bool = False) -> Axis:
    """Ticks at multiples of 1, 2 or 5 times a power of ten.

    Args:
        wanted: about how many ticks.
        whole: no ticks between whole numbers.
        tight: end at the last value instead of at the tick beyond it.
    """
    low, high = _bounds(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / wanted)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    positions = [index * step for index in range(first, last + 1)]
    if tight:
        positions = [position for position in positions if low <= position <= high]
    else:
        low, high = positions[0], positions[-1]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(low, high, tuple((position, f"{position:,.{decimals}f}") for position in positions), log=False)


def log_axis(values: Iterable[float]) -> Axis:
    """Ticks at powers of ten, or at every second or third of them; values of zero are left to the caller."""
    low, high = _bounds(value for value in values if value > 0)
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    stride = -(-(last - first) // _MOST_DECADES)
    exponents = range(first, last + 1, stride)
    return Axis(10.0**first, 10.0**last, tuple((10.0**e, f"1e{e:d}") for e in exponents), log=True)


def named_axis(names: Sequence[str]) -> Axis:
    """A name at 0, 1, 2, …, with half a step of room on either side."""
    return Axis(-0.5, len(names) - 0.5, tuple(enumerate(names)), log=False, named=True)


def _bounds(values: Iterable[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.1, 1.0  # an empty chart still has axes
    return min(finite), max(finite)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if rough <= factor * power * (1 + 1e-9))


WIDTH, HEIGHT = 540, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 48, 48
_COLOURS = 8
_LETTER = 7.5
"""About the width of one."""
_LEGEND_LINE = 20
_SLANT = 25
"""Degrees, of names on the x axis that are too long to stand side by side."""

Line = Literal["solid", "dashed", "dotted", "thin", "none"]


@dataclass(frozen=True)
class Series:
    """One curve: points (x, y). A `wide` one is a pale band, on which another that coincides with it can be seen.

    A series without a label is left out of the legend; `colour` is counted from 0, and the series' own place if None.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    wide: bool = False
    marks: bool = False
    """Whether each point has a dot."""
    line: Line = "solid"
    colour: int | None = None


class Band(NamedTuple):
    """A range of y that is shaded behind the curves."""

    label: str
    low: float
    high: float


class Bar(NamedTuple):
    """A bar from zero, or on those below it; `spread` is the whisker's length to either side."""

    height: float
    spread: float = 0.0


@dataclass(frozen=True)
class Chart:
    """Curves under a heading, and below them what they show.

    Points that are not finite, and on a logarithmic axis those that are not positive, are left out, and the curve
    is interrupted there; a point that stands alone is drawn as a dot.
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
    """Whether the y axis begins at 0."""
    x_names: Sequence[str] = ()
    """What x = 0, 1, 2, … stand for, where they are names."""
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
            _Key(one.label, "mark" if one.line == "none" else "curve", _look(one, index))
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
    """Bars under a heading: for each category one of each group, side by side or, `stacked`, on each other."""

    kind: ClassVar[str] = "chart"
    heading: str
    categories: Sequence[str]
    groups: Mapping[str, Sequence[Bar | None]]
    y_label: str
    caption: str = ""
    stacked: bool = False
    least: tuple[str, Sequence[float]] | None = None
    """A label, and for each category a height that is marked by a dashed line."""

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
        """Each bar with its left edge, its right edge, what it stands on, and its group."""
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
    """An entry of the legend: what is drawn before the label, and its classes."""

    label: str
    shape: Literal["curve", "mark", "band", "least"]
    look: str

    @property
    def width(self) -> float:
        return 28 + _LETTER * len(self.label) + 18


class _Legend:
    """The label of the y axis at the left, and entries at the right, in as many lines as they take."""

    def __init__(self, y_label: str, keys: Sequence[_Key]) -> None:
        self._y_label = y_label
        self._lines: list[list[_Key]] = [[]]
        room = WIDTH - _RIGHT - _LETTER * len(y_label)
        for key in keys:
            if self._lines[-1] and sum(it.width for it in self._lines[-1]) + key.width > room:
                self._lines.append([])
                room = WIDTH - _RIGHT
            self._lines[-1].append(key)

    @property
    def extra_height(self) -> int:
        """Beyond one line."""
        return _LEGEND_LINE * (len(self._lines) - 1)

    def drawn(self) -> Iterator[str]:
        yield _tag("text", "", self._y_label, x=0, y=18)
        for number, line in enumerate(self._lines):
            end, middle = float(WIDTH - _RIGHT), 14 + _LEGEND_LINE * number
            for key in reversed(line):
                classes = f"{key.shape} {key.look}".strip()
                if key.shape in ("curve", "least"):
                    yield _tag("line", classes, x1=round(end - 20), y1=middle, x2=round(end), y2=middle)
                else:
                    yield _tag("rect", classes, x=round(end - 16), y=middle - 5, width=12, height=10)
                yield _tag("text", "", key.label, x=round(end - 28), y=middle + 4, text_anchor="end")
                end -= key.width


@dataclass(frozen=True)
class _Frame:
    """From values to places in the picture."""

    x_axis: Axis
    y_axis: Axis
    legend: _Legend

    @property
    def slanted(self) -> bool:
        """Whether the names on the x axis are too long to stand side by side."""
        room = (WIDTH - _LEFT - _RIGHT) / max(1, len(self.x_axis.ticks))
        return self.x_axis.named and self._longest_name > room

    @property
    def _longest_name(self) -> float:
        return _LETTER * max((len(label) for _, label in self.x_axis.ticks), default=0)

    @property
    def bottom(self) -> int:
        """What stands below the floor."""
        return _BOTTOM + (round(self._longest_name * math.sin(math.radians(_SLANT))) if self.slanted else 0)

    @property
    def height(self) -> int:
        return HEIGHT + self.legend.extra_height + self.bottom - _BOTTOM

    def x(self, value: float) -> float:
        return round(_LEFT + self.x_axis.place(value) * (WIDTH - _LEFT - _RIGHT), 2)

    def y(self, value: float) -> float:
        return round(self.height - self.bottom - self.y_axis.place(value) * (HEIGHT - _TOP - _BOTTOM), 2)

    def shows(self, point: tuple[float, float]) -> bool:
        pairs = zip(point, (self.x_axis, self.y_axis), strict=True)
        return all(math.isfinite(value) and (value > 0 or not axis.log) for value, axis in pairs)


def _picture(title: str, frame: _Frame, x_label: str, marks: Iterator[str], *, alone: bool) -> str:
    parts = [*_axes(frame, x_label), *frame.legend.drawn(), *marks]
    name = "" if not alone else ' xmlns="http://www.w3.org/2000/svg"'
    style = f"<style>\n{templates().get_template('picture.css').render()}</style>\n" if alone else ""
    head = f'<svg{name} class="chart" viewBox="0 0 {WIDTH} {frame.height}" role="img" aria-label="{escape(title)}">'
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


def _curve(frame: _Frame, one: Series, index: int) -> Iterator[str]:
    for shown, stretch in groupby(one.points, key=frame.shows):
        if not shown:
            continue
        places = [(frame.x(x), frame.y(y)) for x, y in stretch]
        if len(places) > 1 and one.line != "none":
            points = " ".join(f"{x},{y}" for x, y in places)
            yield _tag("polyline", f"curve {_look(one, index)}", points=points)
        if len(places) == 1 or one.marks:
            colour = _colour(index if one.colour is None else one.colour)
            yield from (_tag("circle", f"mark {colour}", cx=x, cy=y, r=3 if one.marks else 2) for x, y in places)


def _look(one: Series, index: int) -> str:
    words = [_colour(index if one.colour is None else one.colour)]
    words += ["wide"] if one.wide else []
    return " ".join(words if one.line in ("solid", "none") else [*words, one.line])


def _colour(index: int) -> str:
    """Its class; after the last colour they begin again, paler."""
    return f"s{index % _COLOURS}" + (" pale" if index >= _COLOURS else "")


def _tag(name: str, classes: str, text: str = "", /, **attributes: object) -> str:
    """An element with all text in it escaped; `_` in an attribute's name is a dash."""
    given = {"class": classes, **attributes} if classes else attributes
    pairs = "".join(f' {key.replace("_", "-")}="{escape(str(value))}"' for key, value in given.items())
    return f"<{name}{pairs}>{escape(text)}</{name}>" if text else f"<{name}{pairs}/>"
