"""The paper's tables from finished cells. Accuracies in per cent, differences in points, losses in nats per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from obfuscatune.report.page import Table, format_bytes, format_count, format_seconds, format_share, format_small
from obfuscatune.reproduction.cells import Measured
from obfuscatune.reproduction.compared import Check, Gain, Pairing, deviation, gains, pairings, right
from obfuscatune.reproduction.presets import find_method

_SIZES = ("enclave_peak_bytes", "worker_peak_bytes", "bytes_uploaded")


def make_tables(cells: Sequence[Measured]) -> list[Table]:
    """All tables that these cells have something for, in the paper's order."""
    made: list[Callable[[Sequence[Measured]], Iterator[Table]]] = [
        _accuracy,
        _gain,
        _condition,
        _error_by_depth,
        _share,
        _slowdown,
        _obfuscation,
    ]
    return [table for make in made for table in make(cells)]


def check_table(checks: Sequence[Check]) -> Table:
    """What must hold, and whether it does."""
    rows = [(it.claim, it.measured, "holds" if it.held else "DOES NOT HOLD") for it in checks]
    return Table("What must hold", ("claim", "measured", ""), rows, text_columns=3)


def _accuracy(cells: Sequence[Measured]) -> Iterator[Table]:
    found = pairings(cells)
    if not found:
        return
    seeds = f"Mean ± standard deviation over {max(len(it.plain) for it in found)} seeds. "
    yield Table(
        "1. Accuracy, plain and protected",
        ("task", "method", "plain %", "protected %", "points", "recall, plain %", "recall, protected %", "points"),
        [_accuracy_row(it) for it in found] + list(_mean_rows(found)),
        caption=seeds + "Test questions answered right (exact match for webqs, the likeliest choice for the others, as "
        "lm-evaluation-harness has it); recall: of questions that were trained on.",
        text_columns=2,
    )
    yield Table(
        "1a. Losses and answers",
        ("task", "method", "loss, plain", "loss, protected", "relative", "held out, relative", "answers that differ"),
        [_loss_row(it) for it in found],
        caption=seeds
        + "Loss: nats per token over the whole last epoch; held out: on test records, after the last step. "
        "Answers to test questions that differ from those of the plain model of the same seed, of all seeds together; "
        "in brackets those of them that are ties.",
        text_columns=2,
    )


def _accuracy_row(it: Pairing) -> tuple[str, ...]:
    row = [it.task, it.method]
    for which in ("test", "recall"):
        row += [_spread(it.accuracies(side, which)) for side in (it.plain, it.protected)]
        row.append(f"{it.difference(which):+.2f}")
    return tuple(row)


def _loss_row(it: Pairing) -> tuple[str, ...]:
    differing = sum(len(one.differing) for one in it.answers)
    ties = sum(len(one.ties) for one in it.answers)
    return (
        it.task,
        it.method,
        *(_spread(it.losses(side, "final_loss"), digits=4) for side in (it.plain, it.protected)),
        *(f"{100 * it.loss_difference(name):+.3f} %" for name in ("final_loss", "heldout_after")),
        f"{differing} ({ties}) of {it.questions}",
    )


def _mean_rows(found: Sequence[Pairing]) -> Iterator[tuple[str, ...]]:
    """The mean over tasks, for methods that have several."""
    for method in dict.fromkeys(it.method for it in found):
        own = [it for it in found if it.method == method]
        if len(own) > 1:
            row = [f"mean of {len(own)} tasks", method]
            for which in ("test", "recall"):
                plain = fmean(fmean(it.accuracies(it.plain, which)) for it in own)
                protected = fmean(fmean(it.accuracies(it.protected, which)) for it in own)
                row += [f"{plain:.2f}", f"{protected:.2f}", f"{protected - plain:+.2f}"]
            yield tuple(row)


def _gain(cells: Sequence[Measured]) -> Iterator[Table]:
    found = gains(cells)
    if found:
        yield Table(
            "1b. Before and after tuning",
            ("task", "method", "before %", "after %", "points", "recall, before %", "recall, after %", "points"),
            [_gain_row(it) for it in found],
            caption="Test questions answered right by the model as it came and by the tuned one, with the standard "
            "error of the questions; recall: of questions that were trained on.",
            text_columns=2,
        )


def _gain_row(it: Gain) -> tuple[str, ...]:
    before, after = it.accuracy("test")
    known_before, known_after = it.accuracy("recall")
    return (
        it.task,
        it.method,
        f"{before:.2f} ± {it.standard_error:.2f}",
        f"{after:.2f}",
        f"{after - before:+.2f}",
        f"{known_before:.2f}",
        f"{known_after:.2f}",
        f"{known_after - known_before:+.2f}",
    )


def _condition(cells: Sequence[Measured]) -> Iterator[Table]:
    """Table 2, for every task that was asked in 16 bits."""
    rounded = [cell for cell in cells if cell.kind == "rounded"]
    for task in dict.fromkeys(cell.settings["task"] for cell in rounded):
        asked = [cell for cell in rounded if cell.settings["task"] == task]
        asked += [cell for cell in cells if cell.kind == "accuracy" and cell.settings["task"] == task]
        dtypes = ("float32", *dict.fromkeys(cell.settings["dtype"] for cell in rounded))
        rows = []
        for method in dict.fromkeys(cell.settings["method"] for cell in asked):
            row = [method, _kappa(method)]
            for dtype in dtypes:
                own = [c for c in asked if (c.settings["method"], c.settings["dtype"]) == (method, dtype)]
                row += [_spread([right(cell, which) for cell in own]) for which in ("test", "recall")]
            rows.append(tuple(row))
        yield Table(
            f"2. Accuracy over the condition number: {task}",
            ("method", "cond.", *(f"{what}, {name} %" for name in dtypes for what in ("test", "recall"))),
            rows,
            caption="float32: tuned and asked under the method. 16 bits: the model that was tuned plain in float32, "
            "asked under the method, its adapter in the enclave.",
        )


def _error_by_depth(cells: Sequence[Measured]) -> Iterator[Table]:
    found = [cell for cell in cells if cell.kind == "error"]
    for subject in dict.fromkeys(cell.subject for cell in found):
        own = [cell for cell in found if cell.subject == subject]
        depths = own[0].result["depths"]
        rows = [
            (cell.settings["method"], _kappa(cell.settings["method"]), dtype, *map(format_small, errors))
            for dtype in own[0].result["errors"]
            for cell in own
            for errors in [cell.result["errors"][dtype]]
        ]
        yield Table(
            f"2a. Error of the logits by depth: {subject}",
            ("method", "cond.", "numbers", *(f"{depth} block{'s' if depth > 1 else ''}" for depth in depths)),
            rows,
            caption="Relative, in the Frobenius norm, against the plain model in float64: the rows of plain show what "
            "the number format alone does. "
            + ("English text." if "model" in own[0].settings else "Random weights, random tokens."),
            text_columns=3,
        )


def _share(cells: Sequence[Measured]) -> Iterator[Table]:
    found = [cell for cell in cells if cell.kind == "share"]
    if found:
        yield Table(
            "3. Parameters inside the enclave",
            ("model", "parameters", "paper", "private", "private, of these the first block"),
            [
                (
                    cell.settings["shape"],
                    format_count(cell.result["parameters"]),
                    format_share(cell.result["share"]["paper"]),
                    format_share(cell.result["share"]["private"]),
                    format_count(cell.result["kinds"]["private"]["first_blocks"]),
                )
                for cell in found
            ],
            caption="Counted from the configurations, tied parameters once. Profile private keeps the first block.",
        )


def _slowdown(cells: Sequence[Measured]) -> Iterator[Table]:
    found = [cell for cell in cells if cell.kind == "slowdown"]
    if found:
        bench = found[0].settings
        yield Table(
            "4. Slowdown by size",
            ("model", "blocks", "profile", "plain", "protected", "slowdown", "round by round", "crossed a step"),
            [_slowdown_row(cell.settings, cell.result) for cell in found],
            caption=f"One LoRA step of {bench['batch']} x {bench['length']} tokens, float32, {bench['threads']} "
            "threads, plain at its own best way to wait, in turn in one run; random weights. The paper reports 1.5x to "
            "4.3x on two GPUs.",
            text_columns=3,
        )


def _slowdown_row(settings: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, ...]:
    ratios = result["ratios"]
    return (
        settings["shape"],
        _depth(settings),
        settings["profile"],
        format_seconds(result["plain_seconds"]),
        format_seconds(result["protected_seconds"]),
        f"{median(ratios):.2f}x",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        format_bytes(result["bytes"]),
    )


def _obfuscation(cells: Sequence[Measured]) -> Iterator[Table]:
    found = [(cell.settings, cell.result) for cell in cells if cell.kind == "obfuscate"]
    if found:
        yield Table(
            "5. Time to obfuscate",
            ("model", "blocks", "profile", "transform", "time", "enclave's peak", "worker's peak", "sent"),
            [
                (
                    settings["shape"],
                    _depth(settings),
                    settings["profile"],
                    settings["protection"]["transform"],
                    format_seconds(result["seconds"]),
                    *(format_bytes(result[name]) for name in _SIZES),
                )
                for settings, result in found
            ],
            caption="From safetensors on disk, with random float32 weights, to a protected model, in a fresh process: "
            "reading, transforming and sending. The paper says less than 10 s for GPT2-XL on a GPU.",
            text_columns=4,
        )


def _depth(settings: Mapping[str, Any]) -> str:
    return "all" if settings["layers"] is None else str(settings["layers"])


def _spread(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return ""
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {deviation(values):.{digits}f}" if len(values) > 1 else mean


def _kappa(method: str) -> str:
    if method == "gaussian":
        return "any"
    kappa = find_method(method).condition_number
    return "" if kappa is None else f"{kappa:g}"
