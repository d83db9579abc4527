"""Everything that came out of a demo, and its JSON document."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from obfuscatune.demo.compare import Check, Differences
from obfuscatune.demo.recipe import Settings
from obfuscatune.demo.side import Side
from obfuscatune.tuning.records import Completion

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
    protected: Side
    plain: Side
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


def _side_document(side: Side) -> dict[str, object]:
    return {
        "accuracy": {"before": side.before.value, "after": side.after.value},
        "loss": {"first": side.losses[0], "last": side.losses[-1], "steps": side.losses},
        "seconds": asdict(side.seconds),
        "link": side.link,
        "adapter": str(side.adapter),
    }
