"""What came out of an evaluation: every single answer, with the margin that it was given by."""

import math
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Verdict:
    """One answer: a choice's index, or text, or whether a right answer would be written.

    `margin` says by how much the logits or log-likelihoods (nats) would have to change for another answer.
    """

    answer: int | str | bool
    right: bool
    margin: float


@dataclass(frozen=True)
class Metric:
    """A share of right answers under one rule, with all the answers in the questions' order."""

    name: str
    verdicts: tuple[Verdict, ...]

    @property
    def value(self) -> float:
        """Share of right answers."""
        return fmean(verdict.right for verdict in self.verdicts)

    @property
    def stderr(self) -> float:
        """Standard error of `value`: the sample's standard deviation over the root of its size."""
        if len(self.verdicts) < 2:
            return math.nan
        return stdev(float(verdict.right) for verdict in self.verdicts) / math.sqrt(len(self.verdicts))
