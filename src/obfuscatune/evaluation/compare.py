"""Two evaluations of the same questions, answer by answer."""

from dataclasses import dataclass

from obfuscatune.evaluation.results import Metric

TIE = 1e-3
"""Nats. An answer given by less may fall either way: protected and plain logits agree to 1e-4 in float32
(tests/contract), and a log-likelihood sums over up to some ten tokens."""


@dataclass(frozen=True)
class Comparison:
    """Indices of the questions answered differently; `ties` are those that either gave by less than `TIE`."""

    metric: str
    differing: tuple[int, ...]
    ties: tuple[int, ...]

    @property
    def same_but_for_ties(self) -> bool:
        """Whether every difference is a tie."""
        return self.differing == self.ties


def compare(one: Metric, other: Metric) -> Comparison:
    """Compare two results on the same questions.

    Raises:
        ValueError: they are not of the same metric and number of questions.
    """
    if (one.name, len(one.verdicts)) != (other.name, len(other.verdicts)):
        raise ValueError(f"{one.name} of {len(one.verdicts)} against {other.name} of {len(other.verdicts)}")
    both = list(zip(one.verdicts, other.verdicts, strict=True))
    differing = [index for index, (a, b) in enumerate(both) if a.answer != b.answer]
    ties = [index for index in differing if min(verdict.margin for verdict in both[index]) < TIE]
    return Comparison(one.name, tuple(differing), tuple(ties))
