"""Tuned cells beside the plain ones of the same task and seeds: the numbers of table 1, and what they bear out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

from obfuscatune.evaluation.scoring import Comparison, compare
from obfuscatune.reproduction.accuracy import headline, metric_of
from obfuscatune.reproduction.cells import Measured
from obfuscatune.reproduction.presets import KAPPAS


def right(cell: Measured, which: str) -> float:
    """Per cent of a cell's `test` or `recall` questions answered right."""
    return 100 * float(cell.result[which][headline(cell.settings["task"])]["value"])


@dataclass(frozen=True)
class Pairing:
    """One method on one task, and plain: two lists of cells, seed by seed."""

    task: str
    method: str
    protected: Sequence[Measured]
    plain: Sequence[Measured]

    def accuracies(self, cells: Iterable[Measured], which: str) -> list[float]:
        """Per cent of `test` or `recall` questions right, for each seed."""
        return [right(cell, which) for cell in cells]

    def difference(self, which: str) -> float:
        """Points: the mean over seeds of protected less plain."""
        return fmean(self.accuracies(self.protected, which)) - fmean(self.accuracies(self.plain, which))

    @property
    def standard_error(self) -> float:
        """Points: of plain's accuracy on the test questions, by sampling of the questions; mean over seeds."""
        return fmean(100 * cell.result["test"][headline(self.task)]["stderr"] for cell in self.plain)

    @property
    def spread(self) -> float:
        """Points: the larger of both sides' standard deviations over seeds, on the test questions."""
        return max(deviation(self.accuracies(side, "test")) for side in (self.protected, self.plain))

    def losses(self, cells: Iterable[Measured], name: str) -> list[float]:
        """`final_loss`, `heldout_after`, … of each seed, in nats per token."""
        return [cell.result[name] for cell in cells]

    def loss_difference(self, name: str) -> float:
        """Share: how far the mean over seeds is from plain's."""
        plain = fmean(self.losses(self.plain, name))
        return (fmean(self.losses(self.protected, name)) - plain) / plain

    @property
    def answers(self) -> list[Comparison]:
        """Test questions answered otherwise than by the plain model of the same seed."""
        name = headline(self.task)
        pairs = zip(self.protected, self.plain, strict=True)
        return [compare(metric_of(a.result, "test", name), metric_of(b.result, "test", name)) for a, b in pairs]

    @property
    def questions(self) -> int:
        """Test questions of all seeds together."""
        name = headline(self.task)
        return sum(len(cell.result["test"][name]["verdicts"]) for cell in self.plain)


def pairings(cells: Iterable[Measured]) -> list[Pairing]:
    """Every protected method on every task, for the seeds that plain has been run with too."""
    tuned = {
        (cell.settings["task"], cell.settings["method"], cell.settings["seed"]): cell
        for cell in cells
        if cell.kind == "accuracy"
    }
    found = []
    for task, method in dict.fromkeys((task, method) for task, method, _ in tuned if method != "plain"):
        seeds = sorted(seed for t, m, seed in tuned if (t, m) == (task, method) and (task, "plain", seed) in tuned)
        if seeds:
            protected = [tuned[task, method, seed] for seed in seeds]
            found.append(Pairing(task, method, protected, [tuned[task, "plain", seed] for seed in seeds]))
    return found


@dataclass(frozen=True)
class Gain:
    """What tuning did for one method on one task: the model asked before it, and the tuned ones of every seed."""

    task: str
    method: str
    before: Measured
    after: Sequence[Measured]

    def accuracy(self, which: str) -> tuple[float, float]:
        """Per cent of `test` or `recall` questions right, before and after; after is the mean over seeds."""
        return right(self.before, which), fmean(right(cell, which) for cell in self.after)

    @property
    def standard_error(self) -> float:
        """Points: of the accuracy on the test questions before, by sampling of the questions."""
        return 100 * float(self.before.result["test"][headline(self.task)]["stderr"])


def gains(cells: Sequence[Measured]) -> list[Gain]:
    """Every method on every task that was asked both before and after it was tuned."""
    found = []
    for before in (cell for cell in cells if cell.kind == "untuned"):
        task, method = before.settings["task"], before.settings["method"]
        after = [
            cell
            for cell in cells
            if cell.kind == "accuracy" and (cell.settings["task"], cell.settings["method"]) == (task, method)
        ]
        if after:
            found.append(Gain(task, method, before, after))
    return found


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


MOST_POINTS = 0.5
"""Largest accepted difference of mean accuracy between protected and plain, in percentage points."""
MOST_LOSS = 0.01
"""Largest accepted relative difference of the final loss from plain."""


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
    """Compares mean accuracies, by `MOST_POINTS`; for a single seed, by the standard error over its questions."""
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
            by_subject.setdefault(cell.subject, {})[cell.settings["method"]] = cell
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
