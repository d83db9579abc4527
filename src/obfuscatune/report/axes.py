"""Axes of charts: a range that holds the values, with ticks at round numbers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MOST_DECADES = 7
"""Decades with a tick each; more are labelled every second or third."""


@dataclass(frozen=True)
class Axis:
    """The range of an axis and its ticks.

    Attributes:
        low, high: the range; positive on a logarithmic axis.
        ticks: positions within the range, and their labels.
        log: whether the axis is logarithmic.
        named: whether the labels are names of the values 0, 1, 2, …
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool
    named: bool = False

    def place(self, value: float) -> float:
        """The position of a value on the axis: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(values: Iterable[float], *, wanted: int = 5, whole: bool = False, tight: bool = False) -> Axis:
    """An axis with ticks at multiples of 1, 2 or 5 times a power of ten.

    Args:
        values: must lie in the range; those that are not finite are ignored.
        wanted: approximate number of ticks.
        whole: no ticks between whole numbers.
        tight: the range ends at the extreme values, not at the next ticks.
    """
    low, high = _bounds(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / wanted)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    positions = [index * step for index in range(first, last + 1)]
    if tight:
        positions = [position for position in positions if low <= position <= high]
    else:
        low, high = positions[0], positions[-1]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(low, high, tuple((position, f"{position:,.{decimals}f}") for position in positions), log=False)


def log_axis(values: Iterable[float]) -> Axis:
    """A logarithmic axis with ticks at powers of ten, at most about seven. Values that are not positive are ignored."""
    low, high = _bounds(value for value in values if value > 0)
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    stride = -(-(last - first) // _MOST_DECADES)
    exponents = range(first, last + 1, stride)
    return Axis(10.0**first, 10.0**last, tuple((10.0**e, f"1e{e:d}") for e in exponents), log=True)


def named_axis(names: Sequence[str]) -> Axis:
    """An axis with names at 0, 1, 2, …, and half a step of space at both ends."""
    return Axis(-0.5, len(names) - 0.5, tuple(enumerate(names)), log=False, named=True)


def _bounds(values: Iterable[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.1, 1.0  # an empty chart still has axes
    return min(finite), max(finite)


def _round_step(rough: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if rough <= factor * power * (1 + 1e-9))
