"""The two sides laid beside each other: differences, what must hold, and all of it as a JSON document."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import load as load_tensors

from obfuscatune.demo.settings import LAST_LOSS_TOLERANCE, LOSS_TOLERANCE, WEIGHT_TOLERANCE, Settings
from obfuscatune.errors import ModelFileError
from obfuscatune.evaluation.scoring import Comparison, Metric, compare
from obfuscatune.training.adapter import WEIGHTS
from obfuscatune.training.data_files import Completion
from obfuscatune.training.loop import StepEvent

Name = Literal["protected", "plain"]
Link = Mapping[str, int | float]


@dataclass(frozen=True)
class Seconds:
    """Wall time: to make the model ready (a worker's start included), to answer, to train."""

    ready: float
    before: float
    training: float
    after: float


@dataclass(frozen=True)
class DemoRun:
    """What came of one side. `link` counts what crossed while training, None without protection."""

    name: Name
    before: Metric
    after: Metric
    steps: tuple[StepEvent, ...]
    adapter: Path
    seconds: Seconds
    link: Link | None

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss of every step, in nats per token."""
        return tuple(event.loss for event in self.steps)


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


def compare_runs(protected: DemoRun, plain: DemoRun) -> Differences:
    """Lay the protected run beside the plain one.

    Raises:
        ModelFileError: the adapters do not have the same weights by name and shape.
    """
    losses = tuple(abs(a - b) for a, b in zip(protected.losses, plain.losses, strict=True))
    weight, largest = _compare_adapters(protected.adapter, plain.adapter)
    return Differences(
        losses, weight, largest, compare(protected.before, plain.before), compare(protected.after, plain.after)
    )


def check(settings: Settings, protected: DemoRun, plain: DemoRun, differences: Differences) -> Sequence[Check]:
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


_SAMPLES = 5


@dataclass(frozen=True)
class Shape:
    """Parameters of the model, and those of them that stay in the enclave."""

    parameters: int
    in_enclave: int

    @property
    def enclave_share(self) -> float:
        """Between 0 and 1."""
        return self.in_enclave / self.parameters


@dataclass(frozen=True)
class Sample:
    """One question: the true answer, and what was answered."""

    question: str
    truth: str
    before: str
    protected: str
    plain: str


@dataclass(frozen=True)
class Result:
    """A whole demo."""

    settings: Settings
    shape: Shape
    protected: DemoRun
    plain: DemoRun
    differences: Differences
    checks: Sequence[Check]
    questions: Sequence[Completion]
    environment: Mapping[str, str]
    seconds: float
    """From the first line to the last, wall time."""

    @property
    def passed(self) -> bool:
        """Whether everything held that must."""
        return all(check.passed for check in self.checks)

    @property
    def same_answers(self) -> int:
        """Questions that both sides answered alike after fine-tuning."""
        return len(self.questions) - len(self.differences.after.differing)

    def samples(self) -> list[Sample]:
        """At most five questions, spread over all.

        The records of a patient follow each other, drug, ward, doctor: one more than an even stride shows all three.
        """
        count = len(self.questions)
        return [self._sample(index) for index in range(0, count, count // _SAMPLES + 1)]

    def _sample(self, index: int) -> Sample:
        question = self.questions[index]
        text = question.prompt.removeprefix("Question:").strip().removesuffix("Answer:").strip()
        return Sample(
            text,
            question.completion.strip(),
            str(self.protected.before.verdicts[index].answer),
            str(self.protected.after.verdicts[index].answer),
            str(self.plain.after.verdicts[index].answer),
        )


def document(result: Result) -> dict[str, object]:
    """As JSON: losses in nats per token, times in seconds, shares between 0 and 1."""
    differences = result.differences
    return {
        "passed": result.passed,
        "checks": [asdict(check) for check in result.checks],
        "seconds": result.seconds,
        "seed": result.settings.seed,
        "quick": result.settings.quick,
        "model": asdict(result.shape) | {"enclave_share": result.shape.enclave_share},
        "protected": _side_document(result.protected),
        "plain": _side_document(result.plain),
        "differences": {
            "largest_loss": differences.loss,
            "losses": differences.losses,
            "largest_adapter_weight": differences.weight,
            "largest_weight": differences.largest_weight,
            "questions": len(result.questions),
            "same_answers": result.same_answers,
            "ties": len(differences.after.ties),
        },
        "recipe": result.settings.recipe(Path(), plain=False).model_dump(mode="json", exclude={"out", "plain", "data"}),
        "samples": [asdict(sample) for sample in result.samples()],
        "environment": result.environment,
    }


def _side_document(side: DemoRun) -> dict[str, object]:
    return {
        "accuracy": {"before": side.before.value, "after": side.after.value},
        "loss": {"first": side.losses[0], "last": side.losses[-1], "steps": side.losses},
        "seconds": asdict(side.seconds),
        "link": side.link,
        "adapter": str(side.adapter),
    }
