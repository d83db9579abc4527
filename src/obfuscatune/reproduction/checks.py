"""What the reproduction must show, and whether it did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from obfuscatune.reproduction.cells import Measured
from obfuscatune.reproduction.compared import Gain, Pairing, gains, pairings
from obfuscatune.reproduction.presets import KAPPAS

MOST_POINTS = 0.5
"""Between protected and plain accuracy, means over seeds."""
MOST_LOSS = 0.01
"""Of the plain final loss."""


@dataclass(frozen=True)
class Check:
    """A claim, what was measured, and whether it holds."""

    claim: str
    measured: str
    held: bool


def check(cells: Sequence[Measured]) -> list[Check]:
    """Every claim that these cells can speak on."""
    found = pairings(cells)
    return [*_agreement(found), *_improvement(gains(cells)), *_monotone(cells)]


def _agreement(found: Iterable[Pairing]) -> Iterator[Check]:
    for it in found:
        if it.method in ("paper", "private", "enclave"):
            loss = it.loss_difference("final_loss")
            yield _same_accuracy(it)
            yield Check(
                f"{it.task}, {it.method}: final loss within {MOST_LOSS:.0%} of plain",
                f"{100 * loss:+.2f} %",
                abs(loss) <= MOST_LOSS,
            )
        if it.method in ("private", "enclave"):
            differing = sum(len(one.differing) for one in it.answers)
            ties = sum(len(one.ties) for one in it.answers)
            yield Check(
                f"{it.task}, {it.method}: every question answered as by the plain model, ties aside",
                f"{differing} of {it.questions} differ, {ties} of them ties",
                differing == ties,
            )


def _same_accuracy(it: Pairing) -> Check:
    """Of several seeds their spread is the measure; of a single one, the standard error of the questions."""
    points = it.difference("test")
    if len(it.plain) == 1:
        return Check(
            f"{it.task}, {it.method}: accuracy within one standard error of plain",
            f"{points:+.2f} points, standard error {it.standard_error:.2f}",
            abs(points) <= it.standard_error,
        )
    return Check(
        f"{it.task}, {it.method}: accuracy within {MOST_POINTS} points of plain and within the spread of seeds",
        f"{points:+.2f} points, spread {it.spread:.2f}",
        abs(points) <= min(MOST_POINTS, it.spread),
    )


def _improvement(found: Iterable[Gain]) -> Iterator[Check]:
    for it in found:
        before, after = it.accuracy("test")
        yield Check(
            f"{it.task}, {it.method}: more test questions right after tuning than before",
            f"{before:.2f} % before, {after:.2f} % after",
            after > before,
        )


def _monotone(cells: Iterable[Measured]) -> Iterator[Check]:
    """Error by condition number, at the greatest depth."""
    by_subject: dict[str, dict[str, Measured]] = {}
    for cell in cells:
        if cell.kind == "error":
            subject = cell.name.removesuffix(f" {cell.settings['method']}")
            by_subject.setdefault(subject, {})[cell.settings["method"]] = cell
    for subject, methods in by_subject.items():
        order = ("paper", *(f"conditioned({kappa})" for kappa in KAPPAS if kappa > 1), "gaussian")
        rows = [method for method in order if method in methods]
        if len(rows) < 2:
            continue
        for dtype in methods[rows[0]].result["errors"]:
            errors = [methods[row].result["errors"][dtype][-1] for row in rows]
            yield Check(
                f"{subject}, {dtype}: the error grows with the condition number, naive matrices last",
                ", ".join(f"{error:.1e}" for error in errors),
                all(a < b for a, b in pairwise(errors)),
            )
