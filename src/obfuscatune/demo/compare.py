"""The two sides against each other, and whether they agree."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load as load_tensors

from obfuscatune.demo.recipe import LAST_LOSS_TOLERANCE, LOSS_TOLERANCE, WEIGHT_TOLERANCE, Settings
from obfuscatune.demo.side import Side
from obfuscatune.evaluation.compare import Comparison, compare
from obfuscatune.tuning.adapter import WEIGHTS
from obfuscatune.wire.errors import ModelFileError


@dataclass(frozen=True)
class Check:
    """Something that must hold: `measured` against `limit`."""

    name: str
    measured: float
    limit: float
    passed: bool


@dataclass(frozen=True)
class Differences:
    """How far apart the two sides are.

    `losses` are absolute, one a step, in nats per token; `weight` is the largest absolute difference of any adapter
    weight, and `largest_weight` the largest weight, to compare it with.
    """

    losses: tuple[float, ...]
    weight: float
    largest_weight: float
    before: Comparison
    after: Comparison

    @property
    def loss(self) -> float:
        """Largest of any step."""
        return _largest(self.losses)


def compare_sides(protected: Side, plain: Side) -> Differences:
    """Lay the protected run beside the plain one.

    Raises:
        ModelFileError: the adapters do not have the same weights by name and shape.
    """
    losses = tuple(abs(a - b) for a, b in zip(protected.losses, plain.losses, strict=True))
    weight, largest = _compare_adapters(protected.adapter, plain.adapter)
    return Differences(
        losses, weight, largest, compare(protected.before, plain.before), compare(protected.after, plain.after)
    )


def check(settings: Settings, protected: Side, plain: Side, differences: Differences) -> Sequence[Check]:
    """Everything that must hold for the demo to have shown what it is to show."""
    beyond_ties = len(differences.after.differing) - len(differences.after.ties)
    checks = [
        _at_most("last loss difference", differences.losses[-1], LAST_LOSS_TOLERANCE),
        _at_most("largest loss difference", differences.loss, LOSS_TOLERANCE),
        _at_most("largest adapter weight difference", differences.weight, WEIGHT_TOLERANCE),
        _at_most("questions answered differently, ties aside", beyond_ties, 0),
    ]
    for side in (protected, plain):
        measured, limit = side.after.value, settings.least_accuracy
        checks.append(Check(f"accuracy after, {side.name}", measured, limit, measured >= limit))
    return checks


def _at_most(name: str, measured: float, limit: float) -> Check:
    return Check(name, measured, limit, measured <= limit)


def _compare_adapters(one: Path, other: Path) -> tuple[float, float]:
    """Largest absolute difference of any weight, and the largest absolute weight."""
    a, b = (load_tensors((folder / WEIGHTS).read_bytes()) for folder in (one, other))
    if {name: it.shape for name, it in a.items()} != {name: it.shape for name, it in b.items()}:
        raise ModelFileError(f"{one} and {other} are not adapters of the same layers")
    difference = _largest([(a[name] - b[name]).abs().max().item() for name in a])
    return difference, _largest([it.abs().max().item() for it in b.values()])


def _largest(values: Sequence[float]) -> float:
    """The maximum, or NaN if there is any: Python's `max` would pass over it."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)
