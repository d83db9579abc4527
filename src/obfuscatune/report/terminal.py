"""A result on a terminal: where it is printed, tables without rules, and curves of eight dots in every character."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from obfuscatune.report.axes import Axis, linear_axis

_FIRST = 0x2800  # the braille pattern without dots
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column within a cell
_MARGIN = 7
_PIPE_WIDTH = 160


def result_console() -> Console:
    """Standard output. A pipe has no width of its own: it is taken to be so wide that no line is cut."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def plain_table(*text: str | Column, numbers: Sequence[str] = (), gap: int = 2, title: str | None = None) -> Table:
    """A table without rules, to be filled: columns of text first, then those of numbers, `gap` spaces between them."""
    columns = (*text, *(Column(heading, justify="right") for heading in numbers))
    return Table(
        *columns,
        box=None,
        pad_edge=False,
        padding=(0, gap, 0, 0),
        header_style="bold",
        title=title,
        title_justify="left",
        title_style="bold",
    )


@dataclass(frozen=True)
class Curve:
    """One value a step, and how it is coloured in rich's terms. A later curve is drawn over an earlier one."""

    label: str
    values: Sequence[float]
    style: str


def draw(curves: Sequence[Curve], *, steps: int, columns: int, rows: int) -> Text:
    """A chart of `rows` lines of curve and two below, `columns` wide, whose right edge is step `steps`.

    Curves may have fewer values than that: they are drawn as far as they go.
    """
    width, axis = columns - _MARGIN - 1, linear_axis([0.0, *(value for curve in curves for value in curve.values)])
    cells: dict[tuple[int, int], tuple[int, str]] = {}
    for curve in curves:
        own: dict[tuple[int, int], int] = {}
        for x, y in _dots(curve.values, axis, steps, 2 * width, 4 * rows):
            cell = y // 4, x // 2
            own[cell] = own.get(cell, 0) | _DOTS[y % 4][x % 2]
        cells |= {cell: (pattern, curve.style) for cell, pattern in own.items()}
    labels = {round((1 - axis.place(value)) * (rows - 1)): label for value, label in axis.ticks}
    text = Text(no_wrap=True)
    for row in range(rows):
        text.append(f"{labels.get(row, ''):>{_MARGIN}}{'┤' if row in labels else '│'}", "dim")
        for column in range(width):
            pattern, style = cells.get((row, column), (0, ""))
            text.append(chr(_FIRST + pattern) if pattern else " ", style)
        text.append("\n")
    text.append(f"{'':>{_MARGIN}}└{'─' * width}\n", "dim")
    text.append(f"{'':>{_MARGIN}} {'1':<{width // 2}}", "dim")
    text.append(f"{f'step {steps}':>{width - width // 2}}", "dim")
    return text


def legend(curves: Sequence[Curve]) -> Text:
    """What each colour is."""
    text = Text(" " * (_MARGIN + 1))
    for curve in curves:
        text.append(f"━━ {curve.label}   ", curve.style)
    return text


def _dots(values: Sequence[float], axis: Axis, steps: int, width: int, height: int) -> Iterator[tuple[int, int]]:
    """Places (x, y) of a line through the values, y counted from the top; every two neighbours touch."""
    before = None
    for x in range(width):
        at = x * max(1, steps - 1) / (width - 1)
        left = int(at)
        if at > len(values) - 1:
            return
        right = min(left + 1, len(values) - 1)
        value = values[left] + (at - left) * (values[right] - values[left])
        y = round((1 - axis.place(value)) * (height - 1))
        start = y if before is None or abs(y - before) < 2 else before + (1 if y > before else -1)
        yield from ((x, between) for between in range(min(start, y), max(start, y) + 1))
        before = y
