"""What an attack is, what it may know, and how its success is told from luck."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, overload

from torch import Tensor

if TYPE_CHECKING:
    from obfuscatune.audit.attacks.knowledge import Knowledge
    from obfuscatune.audit.attacks.scoring import Truth
    from obfuscatune.audit.attacks.view import WorkerView


class Attacker(StrEnum):
    """What an attacker has besides the transcript and the algorithm. Nobody has the enclave's secrets."""

    CLOSED = "closed"
    """Nothing."""
    PUBLIC_TEXT = "public-text"
    """Text of the same kind as the private one, and the tokenizer."""
    PUBLIC_BASE = "public-base"
    """The published model of which the secret one is a fine-tune, its tokenizer, and public text to run it on."""
    KNOWN_PLAINTEXT = "known-plaintext"
    """For some calls the plain rows that crossed in them."""


class Target(StrEnum):
    """What is to be learnt."""

    TOKENS = "tokens"
    WEIGHTS = "weights"
    STRUCTURE = "structure"
    """Of the secret matrices, or which calls belong together: a step towards tokens or weights, no token or weight."""
    SHAPES = "shapes"
    """Lengths and phases: open by construction in every profile without padding."""


class OnDemand(Sequence[Tensor]):
    """Tensors that are made each time they are asked for: those of a real model do not fit in memory together."""

    def __init__(self, makers: Sequence[Callable[[], Tensor]]) -> None:
        self._makers = makers

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> OnDemand: ...

    def __getitem__(self, index: int | slice) -> Tensor | OnDemand:
        found = self._makers[index]
        return OnDemand(found) if isinstance(found, Sequence) else found()

    def __len__(self) -> int:
        return len(self._makers)


class CannotRun(Exception):
    """The transcript or the knowledge lacks what the attack needs. Never to be counted as withstood."""


@dataclass(frozen=True)
class Recovered:
    """A piece of text that the attacker made out, and the true one."""

    true: str
    guess: str


@dataclass(frozen=True)
class Finding:
    """What an attack reached, beside what luck reaches.

    Attributes:
        value: in the attack's own measure.
        chance: what the same measure gives to an attacker who guesses without looking.
        best: what complete success gives.
        error: standard error of `value` by sampling within this run; 0 where everything was looked at.
        samples: how many things were scored.
        details: further figures, by name.
        curve: value against the number of known or observed things.
        recovered: text, for attacks on tokens.
    """

    value: float
    chance: float
    best: float
    samples: int
    error: float = 0.0
    details: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[float, float], ...] = ()
    recovered: tuple[Recovered, ...] = ()

    @property
    def advantage(self) -> float:
        """How far from chance to complete success, 0 to 1; below chance is 0."""
        return min(1.0, max(0.0, (self.value - self.chance) / (self.best - self.chance)))


@dataclass(frozen=True)
class NotRun:
    """An attack that could not be tried, and why. Nothing follows from it."""

    why: str


class Attack(Protocol):
    """One way to learn something from a transcript.

    `run` gets what the attacker has and never sees the truth; `score` compares what came out with it. Scores are
    such that `best` is better than `chance`, whichever way the measure goes.
    """

    @property
    def name(self) -> str:
        """A few words with dashes, unique."""

    @property
    def needs(self) -> Attacker:
        """Who can run it."""

    @property
    def target(self) -> Target:
        """What it is after."""

    @property
    def measure(self) -> str:
        """What `value` is."""

    @property
    def source(self) -> str:
        """Where it is from."""

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> Any:
        """The attacker's guess.

        Raises:
            CannotRun: something that it needs is not there.
        """

    def score(self, guess: Any, truth: Truth) -> Finding:
        """How good the guess is.

        Raises:
            CannotRun: there is nothing to score it on.
        """


def perform(attack: Attack, view: WorkerView, knowledge: Knowledge, truth: Truth, seed: int) -> Finding | NotRun:
    """Run an attack and score it."""
    try:
        return attack.score(attack.run(view, knowledge, seed), truth)
    except CannotRun as reason:
        return NotRun(str(reason))
