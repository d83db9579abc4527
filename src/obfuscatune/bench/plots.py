"""Pictures of the results, drawn by matplotlib as SVG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from obfuscatune.bench.memory import PROCESSES, MemoryResult
from obfuscatune.bench.step_result import PLAIN, StepResult
from obfuscatune.bench.wire import WireResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 8.0, 3.9  # inches
_NOTHING: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def plot_step(result: StepResult) -> str:
    """One bar for each side, stacked by where its time goes; a line where the least possible time lies."""
    sides = {PLAIN: result.plain} | result.protected
    parts = {name: side.breakdown() for name, side in sides.items()}
    categories = list(dict.fromkeys(category for side in reversed(parts.values()) for category in side))
    figure, axes = new_figure()
    colours = _colours(len(categories))
    bottoms = [0.0] * len(sides)
    for category, colour in zip(categories, colours, strict=True):
        heights = [side.get(category, 0.0) for side in parts.values()]
        axes.bar(range(len(sides)), heights, 0.6, bottom=bottoms, label=category, color=colour)
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    for place, side in enumerate(sides.values()):
        least = side.least_seconds(result.limits)
        label = "_" if place else "least possible"  # a name that begins so is not shown
        axes.hlines(least, place - 0.38, place + 0.38, colors="black", linestyles="--", label=label)
    axes.set_xticks(range(len(sides)), list(sides))
    axes.set_ylabel("seconds")
    return as_svg(figure, axes)


def plot_wire(result: WireResult) -> str:
    """A curve for each link: how long so many bytes take, there and back; the fitted lines are thin."""
    figure, axes = new_figure()
    for link, colour in zip(result.bench.links, _colours(2 * len(result.bench.links))[::2], strict=True):
        points = [(row.nbytes, row.seconds) for row in result.rows if row.link == link]
        axes.plot(*zip(*points, strict=True), "o", color=colour, label=link)
        fitted = result.fitted(link)
        axes.plot([x for x, _ in points], [fitted.seconds(x) for x, _ in points], color=colour, linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="bytes, there and back", ylabel="seconds")
    return as_svg(figure, axes)


def plot_memory(result: MemoryResult) -> str:
    """A curve for each process under each profile: what it holds after each step."""
    figure, axes = new_figure()
    colours = _colours(2 * len(result.runs))
    for index, run in enumerate(result.runs):
        for process, colour in zip(PROCESSES, colours[2 * index :], strict=False):
            axes.plot([held / 1e6 for held in run.held(process)], color=colour, label=f"{run.profile}, {process}")
    axes.set(xlabel="steps after the warm-up", ylabel="resident, MB")
    axes.set_ylim(bottom=0)
    return as_svg(figure, axes)


def new_figure() -> tuple[Figure, Axes]:
    """An empty one, without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def as_svg(figure: Figure, axes: Axes) -> str:
    """The file's text, with a legend beside the picture; equal figures give equal text."""
    import matplotlib as mpl

    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper", frameon=False)
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "obfuscatune", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata=_NOTHING)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab20"](index % 20) for index in range(count)]
