"""Pictures of the tables, drawn by matplotlib into the page itself."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING, Any

from obfuscatune.reproduction.cells import Measured
from obfuscatune.reproduction.compared import deviation, pairings
from obfuscatune.reproduction.methods import find_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 7.2, 3.9  # inches
_COLOURS = ("#2563c9", "#d9730d", "#0b7a4b", "#8a3ab9", "#5b6675", "#b3261e", "#0e7490", "#a16207")


@dataclass(frozen=True)
class Plot:
    """A section of the page: an SVG under a heading."""

    heading: str
    svg: str
    caption: str

    def html(self) -> str:
        """One `<section>`, white in a dark page too."""
        picture = f'<figure style="background: #fff; border-radius: 6px">{self.svg}</figure>'
        return (
            f'<section><h2>{escape(self.heading)}</h2>{picture}<p class="caption">{escape(self.caption)}</p></section>'
        )


def make_plots(cells: Sequence[Measured]) -> list[Plot]:
    """All plots that these cells have something for."""
    return [*_accuracy(cells), *_condition(cells), *_depth(cells), *_slowdown(cells)]


def _accuracy(cells: Sequence[Measured]) -> Iterator[Plot]:
    found = [it for it in pairings(cells) if it.method in ("paper", "private", "enclave")]
    if not found:
        return
    tasks = list(dict.fromkeys(it.task for it in found))
    bars: dict[str, dict[str, list[float]]] = {"plain": {it.task: it.accuracies(it.plain, "test") for it in found}}
    for it in found:
        bars.setdefault(it.method, {})[it.task] = it.accuracies(it.protected, "test")
    figure, axes = _figure()
    width = 0.8 / len(bars)
    for index, (method, values) in enumerate(bars.items()):
        places = [place + (index - (len(bars) - 1) / 2) * width for place, task in enumerate(tasks) if task in values]
        means = [fmean(values[task]) for task in tasks if task in values]
        spreads = [deviation(values[task]) for task in tasks if task in values]
        axes.bar(places, means, width, yerr=spreads, capsize=3, label=method, color=_COLOURS[index])
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("test questions right, %")
    yield _plot(figure, axes, "Accuracy, plain and protected", "Bars: means over seeds; whiskers: standard deviation.")


def _condition(cells: Sequence[Measured]) -> Iterator[Plot]:
    found = [
        (kappa, cell)
        for cell in cells
        if cell.kind == "error" and cell.settings["method"] != "private"
        for kappa in [find_method(cell.settings["method"]).condition_number]
        if kappa is not None
    ]
    if len({kappa for kappa, _ in found}) < 2:
        return
    figure, axes = _figure()
    subjects = list(dict.fromkeys(cell.name.removesuffix(f" {cell.settings['method']}") for _, cell in found))
    styles = ("-", "--", ":", "-.")
    for index, dtype in enumerate(found[0][1].result["errors"]):
        for style, subject in zip(styles, subjects, strict=False):
            points = sorted(
                (kappa, cell.result["errors"][dtype][-1])
                for kappa, cell in found
                if cell.name.startswith(subject + " ")
            )
            axes.plot(*zip(*points, strict=True), style, marker="o", color=_COLOURS[index], label=f"{subject}, {dtype}")
    axes.set(xscale="log", yscale="log", xlabel="condition number", ylabel="relative error of the logits")
    yield _plot(figure, axes, "Error over the condition number", "At the greatest depth measured.")


def _depth(cells: Sequence[Measured]) -> Iterator[Plot]:
    found = [cell for cell in cells if cell.kind == "error" and cell.settings.get("shape") is not None]
    if not found:
        return
    shape = found[0].settings["shape"]
    own = [cell for cell in found if cell.settings["shape"] == shape]
    for dtype in own[0].result["errors"]:
        figure, axes = _figure()
        for index, cell in enumerate(own):
            label, colour = cell.settings["method"], _COLOURS[index % len(_COLOURS)]
            axes.plot(cell.result["depths"], cell.result["errors"][dtype], marker="o", color=colour, label=label)
        axes.set(yscale="log", xlabel="blocks", ylabel="relative error of the logits")
        yield _plot(figure, axes, f"Error by depth in {dtype}", f"The shape of {shape}, random weights and tokens.")


def _slowdown(cells: Sequence[Measured]) -> Iterator[Plot]:
    found = [cell for cell in cells if cell.kind == "slowdown"]
    if not found:
        return
    shapes = list(dict.fromkeys(cell.settings["shape"] for cell in found))
    figure, axes = _figure()
    for index, profile in enumerate(dict.fromkeys(cell.settings["profile"] for cell in found)):
        own = {c.settings["shape"]: c.result["ratio"] for c in found if c.settings["profile"] == profile}
        places = [place for place, shape in enumerate(shapes) if shape in own]
        axes.plot(places, [own[shapes[p]] for p in places], marker="o", color=_COLOURS[index], label=profile)
    axes.axhspan(1.5, 4.3, alpha=0.12, color=_COLOURS[4], label="the paper's range")
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("protected step / plain step")
    yield _plot(figure, axes, "Slowdown by size", "Shapes with fewer blocks than their own: see the table.")


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plot(figure: Figure, axes: Axes, heading: str, caption: str) -> Plot:
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper", frameon=False)
    return Plot(heading, _svg(figure, heading), caption)


def _svg(figure: Figure, name: str) -> str:
    """The `<svg>` element alone, without metadata, its identifiers unlike those of any other picture on the page."""
    import matplotlib as mpl

    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "obfuscatune", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    own = re.sub("[^a-z0-9]+", "-", name.lower())
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{escape(name)}"', svg, count=1)
