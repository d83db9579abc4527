"""The report in three forms: Markdown to quote, CSV to compute with, one HTML page to read.

<out>/report.md, <out>/report.html    the tables, what must hold, how it was measured
<out>/<kind>.csv                      a line for each number of each cell
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from obfuscatune.report.page import Facts, Section, Verdict, render_page
from obfuscatune.reproduction.cells import Measured
from obfuscatune.reproduction.charts import make_charts
from obfuscatune.reproduction.compared import Check
from obfuscatune.reproduction.request import Request
from obfuscatune.reproduction.tables import check_table, make_tables

_NOT_IN_CSV = {"verdicts", "losses", "rounds"}


def to_markdown(request: Request, cells: Sequence[Measured], checks: Sequence[Check]) -> str:
    """`report.md`."""
    parts = [f"# The paper's tables, preset `{request.preset.name}`", _settings_line(request)]
    for table in [*make_tables(cells), *([check_table(checks)] if checks else [])]:
        parts += [f"## {table.heading}", table.markdown(), table.caption]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_html(request: Request, cells: Sequence[Measured], checks: Sequence[Check]) -> str:
    """`report.html`: it needs nothing but itself."""
    sections: list[Section] = [_verdict(checks)] if checks else []
    sections += [*make_tables(cells), *make_charts(cells)]
    if checks:
        sections.append(check_table(checks))
    sections += [Facts("Settings", _facts(request)), Facts("Environment", cells[-1].environment)]
    return render_page(
        title="ObfuscaTune, the paper's tables",
        subtitle=f"obfuscatune reproduce --preset {request.preset.name}",
        sections=sections,
        footer="Written by `obfuscatune reproduce`; the same in numbers is in the CSV files beside this page, and "
        "every single answer in cells/.",
    )


def to_csv(cells: Sequence[Measured]) -> dict[str, str]:
    """A file for each kind of cell: a line for each number, under the cell's settings."""
    files = {}
    for kind in dict.fromkeys(cell.kind for cell in cells):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("cell", "method", "task", "seed", "dtype", "quantity", "value"))
        for cell in (cell for cell in cells if cell.kind == kind):
            of = cell.settings
            named = (of.get("method") or of.get("profile", ""), of.get("task", ""), of.get("seed", ""))
            for quantity, value in _numbers(cell.result):
                writer.writerow((cell.name, *named, of.get("dtype", ""), quantity, value))
        files[f"{kind}.csv"] = text.getvalue()
    return files


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _NOT_IN_CSV:
                yield from _numbers(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{path}[{index}]")
    else:
        yield path, value


def _verdict(checks: Sequence[Check]) -> Verdict:
    failed = [check for check in checks if not check.held]
    if failed:
        return Verdict(
            f"{len(checks) - len(failed)} of {len(checks)} claims hold; those that do not are listed below.", "bad"
        )
    return Verdict(f"All {len(checks)} claims that were checked hold.", "good")


def _settings_line(request: Request) -> str:
    return "; ".join(f"{name}: {value}" for name, value in _facts(request).items()) + "."


def _facts(request: Request) -> dict[str, str]:
    preset = request.preset
    return {
        "preset": preset.name if preset.name == "paper" else f"{preset.name}, scaled down from the paper's recipe",
        "model": request.model or "the embedded model (4.3 million parameters, our own)",
        "LoRA": "rank 16, alpha 32, dropout 0.05, all linear layers",
        "optimizer": f"AdamW, rate {preset.lr:g}, {preset.schedule}; gradient norm clipped at 1",
        "training": f"{preset.epochs} epochs over {preset.records or 'all'} records of each task, "
        f"batches of {preset.batch_size}",
        "questions": f"{preset.questions or 'all'} test questions of each task, {preset.recalled} of the training set",
        "seeds": ", ".join(map(str, preset.seeds)),
    }
