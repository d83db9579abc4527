"""Pictures of the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from obfuscatune.report.charts import Band, Bar, Bars, Chart, Line, Series
from obfuscatune.reproduction.cells import Measured
from obfuscatune.reproduction.compared import deviation, pairings
from obfuscatune.reproduction.presets import find_method

_LINES: tuple[Line, ...] = ("solid", "dashed", "dotted", "thin")


def make_charts(cells: Sequence[Measured]) -> list[Bars | Chart]:
    """All that these cells have something for."""
    return [*_accuracy(cells), *_condition(cells), *_depth(cells), *_slowdown(cells)]


def _accuracy(cells: Sequence[Measured]) -> Iterator[Bars]:
    found = [it for it in pairings(cells) if it.method in ("paper", "private", "enclave")]
    if not found:
        return
    tasks = list(dict.fromkeys(it.task for it in found))
    values = {"plain": {it.task: it.accuracies(it.plain, "test") for it in found}}
    for it in found:
        values.setdefault(it.method, {})[it.task] = it.accuracies(it.protected, "test")
    yield Bars(
        "Accuracy, plain and protected",
        tasks,
        {
            method: [Bar(fmean(own[task]), deviation(own[task])) if task in own else None for task in tasks]
            for method, own in values.items()
        },
        y_label="test questions right, %",
        caption="Bars: means over seeds; whiskers: standard deviation.",
    )


def _condition(cells: Sequence[Measured]) -> Iterator[Chart]:
    found = [
        (kappa, cell)
        for cell in cells
        if cell.kind == "error" and cell.settings["method"] != "private"
        for kappa in [find_method(cell.settings["method"]).condition_number]
        if kappa is not None
    ]
    if len({kappa for kappa, _ in found}) < 2:
        return
    subjects = list(dict.fromkeys(cell.subject for _, cell in found))
    series = []
    for index, dtype in enumerate(found[0][1].result["errors"]):
        for line, subject in zip(_LINES, subjects, strict=False):
            points = sorted(
                (float(kappa), float(cell.result["errors"][dtype][-1]))
                for kappa, cell in found
                if cell.subject == subject
            )
            series.append(Series(f"{subject}, {dtype}", tuple(points), marks=True, line=line, colour=index))
    yield Chart(
        "Error over the condition number",
        series,
        x_label="condition number",
        y_label="relative error of the logits",
        caption="At the greatest depth measured.",
        log_x=True,
        log_y=True,
    )


def _depth(cells: Sequence[Measured]) -> Iterator[Chart]:
    found = [cell for cell in cells if cell.kind == "error" and cell.settings.get("shape") is not None]
    if not found:
        return
    shape = found[0].settings["shape"]
    own = [cell for cell in found if cell.settings["shape"] == shape]
    for dtype in own[0].result["errors"]:
        yield Chart(
            f"Error by depth in {dtype}",
            [
                Series(
                    cell.settings["method"],
                    tuple(zip(cell.result["depths"], cell.result["errors"][dtype], strict=True)),
                    marks=True,
                )
                for cell in own
            ],
            x_label="blocks",
            y_label="relative error of the logits",
            caption=f"The shape of {shape}, random weights and tokens.",
            log_y=True,
        )


def _slowdown(cells: Sequence[Measured]) -> Iterator[Chart]:
    found = [cell for cell in cells if cell.kind == "slowdown"]
    if not found:
        return
    shapes = list(dict.fromkeys(cell.settings["shape"] for cell in found))
    series = []
    for profile in dict.fromkeys(cell.settings["profile"] for cell in found):
        own = {cell.settings["shape"]: cell.result["ratio"] for cell in found if cell.settings["profile"] == profile}
        points = tuple((float(place), own[shape]) for place, shape in enumerate(shapes) if shape in own)
        series.append(Series(profile, points, marks=True))
    yield Chart(
        "Slowdown by size",
        series,
        x_label="",
        y_label="protected step / plain step",
        caption="Shapes with fewer blocks than their own: see the table.",
        from_zero=True,
        x_names=shapes,
        band=Band("the paper's range", 1.5, 4.3),
    )
