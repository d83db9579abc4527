"""What came of the demo: the steps that were taken, what was refused, what the search found."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """Something that a party did."""

    who: str
    what: str
    told: str
    seconds: float


@dataclass(frozen=True)
class Refusal:
    """Something that must not work: who tried, and in which words it was refused. `held` is whether it was."""

    who: str
    attempt: str
    reason: str
    held: bool


@dataclass(frozen=True)
class Searched:
    """A search of one place. `found` is by kind of canary; a control must find, all else must not."""

    place: str
    megabytes: float
    found: Mapping[str, int]
    is_control: bool = False

    @property
    def held(self) -> bool:
        """Whether it found what it should."""
        return bool(sum(self.found.values())) == self.is_control


@dataclass
class Scene:
    """One profile's part, as it grows."""

    profile: str
    steps: list[Step] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    searches: list[Searched] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    answers: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Question, true answer, before, after."""
    canaries: dict[str, int] = field(default_factory=dict)
    """How many were searched for, by kind."""
    checks: dict[str, bool] = field(default_factory=dict)
    """What must hold besides, in words."""

    @property
    def right(self) -> int:
        """Questions that were answered right after the job."""
        return sum(after.strip() == truth for _, truth, _, after in self.answers)

    @property
    def passed(self) -> bool:
        """Whether everything held that must."""
        held: list[Refusal | Searched] = [*self.refusals, *self.searches]
        return bool(self.refusals and self.searches) and all(it.held for it in held) and all(self.checks.values())

    def failures(self) -> list[str]:
        """What did not hold, a line each."""
        lines = [f"not refused: {it.who}: {it.attempt} ({it.reason})" for it in self.refusals if not it.held]
        for it in self.searches:
            if not it.held:
                lines.append(
                    f"the control found nothing: {it.place}" if it.is_control else f"found: {it.place}: {it.found}"
                )
        return lines + [f"does not hold: {name}" for name, held in self.checks.items() if not held]


@dataclass(frozen=True)
class Result:
    """The whole demo."""

    scenes: Sequence[Scene]
    isolated: bool
    client: str
    environment: Mapping[str, str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every part did."""
        return all(scene.passed for scene in self.scenes)


def document(result: Result) -> dict[str, Any]:
    """As JSON."""
    scenes = [
        {
            **asdict(scene),
            "searches": [{**asdict(it), "held": it.held} for it in scene.searches],
            "passed": scene.passed,
            "failures": scene.failures(),
        }
        for scene in result.scenes
    ]
    return {
        "passed": result.passed,
        "seconds": result.seconds,
        "network_namespaces": result.isolated,
        "client": result.client,
        "scenes": scenes,
        "environment": dict(result.environment),
    }
