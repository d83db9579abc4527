"""The accountant of the masks: what the compute worker can have learned so far, at the most.

A request under a one-time mask is a Gaussian mechanism: rows x, scaled so that |x|² <= p, and noise of the standard
deviation L. Whichever two inputs are to be told apart, the rows of one request differ by |x - x'|² <= 4 n p, so

    mu² of a request      4 n p / L²
    mu² of a run          the sum: Gaussian mechanisms compose so, adaptively (Dong, Roth, Su 2019, corollary 3.3)
    advantage             2 Phi(mu / 2) - 1     of any test on all that was sent

docs/guarded.md has the theorem, its proof and what it assumes.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from obfuscatune.errors import BudgetExceeded, ConfigError

PARTS = 1000
"""Of the budget's mu²: each is written down before any of it is spent (`Accountant.keep_by`)."""
DEFAULT_BUDGET = 0.01
"""Advantage. 2.7 · 10⁹ rows of 4,096 elements pass."""
SLACK = 1.01
"""Of mu²: rows are rounded to the grid, and rotated and mixed in float32, before they are masked; both lengthen the
difference of two inputs by less than one part in 10⁴."""


@dataclass(frozen=True)
class Spent:
    """What was sent under masks, and what can be learned of it."""

    rows: int
    mu: float
    by_layer: dict[str, float]
    """mu of each layer's requests alone."""

    @property
    def advantage(self) -> float:
        """The most that any test tells two inputs apart by, on all traffic: 0 is a guess, 1 is certainty."""
        return advantage(self.mu)


def advantage(mu: float) -> float:
    """2 Phi(mu / 2) - 1."""
    return math.erf(mu / math.sqrt(8))


def check_budget(budget: float) -> None:
    """Return where it is an advantage that can be allowed.

    Raises:
        ConfigError: it is none.
    """
    if not 0 < budget < 1:
        raise ConfigError(f"a mask budget is an advantage above 0 and below 1, got {budget}")


class Accountant:
    """Adds up mu² as requests are sent, and refuses what would pass the budget. Safe from any thread."""

    def __init__(self, deviation: float, budget: float = DEFAULT_BUDGET) -> None:
        """
        Args:
            deviation: L, the standard deviation of a mask's elements.
            budget: largest advantage, between 0 and 1.

        Raises:
            ConfigError: the budget is none.
        """
        check_budget(budget)
        self.deviation, self.budget = deviation, budget
        self._squares: defaultdict[str, float] = defaultdict(float)
        self._total = 0.0
        self._rows = 0
        self._reserved = 0.0
        self._keep: Callable[[int, float], None] | None = None
        self._lock = threading.Lock()

    def keep_by(self, keep: Callable[[int, float], None]) -> None:
        """Have `keep` write rows and mu down before they are spent, in parts of the budget.

        What is kept is never below what was sent, so a run that is killed has counted all, nor far above it.
        """
        with self._lock:
            self._keep, self._reserved = keep, 0.0

    def spend(self, layer: str, rows: int, width: int) -> None:
        """Count one request of `rows` rows of `width` elements, before it is sent.

        Raises:
            BudgetExceeded: it would pass the budget; it must not be sent, and is not counted.
        """
        square = SLACK * 4 * rows * width / self.deviation**2
        with self._lock:
            if not advantage(math.sqrt(self._total + square)) <= self.budget:  # NaN is not, either
                raise BudgetExceeded(
                    f"one more request would let the compute worker tell two inputs apart with an advantage above "
                    f"{self.budget:g}, the mask budget; {self._rows:,} rows were sent. Save the adapter and load the "
                    "model anew only if your policy allows to add up what both runs show, or raise the budget"
                )
            if self._keep is not None and self._total + square > self._reserved:
                part = (2 * NormalDist().inv_cdf((1 + self.budget) / 2)) ** 2 / PARTS
                self._reserved = self._total + max(square, part)
                self._keep(self._rows + rows, math.sqrt(self._reserved))
            self._total += square
            self._squares[layer] += square
            self._rows += rows

    def carry(self, rows: int, mu: float) -> None:
        """Add what an earlier part of the same run has spent.

        Raises:
            ValueError: these are no such numbers.
        """
        if rows < 0 or not 0 <= mu < math.inf:
            raise ValueError(f"{rows} rows and a mu of {mu}")
        with self._lock:
            self._total += mu**2
            self._rows += rows

    @property
    def spent(self) -> Spent:
        """The account at this moment."""
        with self._lock:
            by_layer = {layer: math.sqrt(square) for layer, square in self._squares.items()}
            return Spent(self._rows, math.sqrt(self._total), by_layer)
