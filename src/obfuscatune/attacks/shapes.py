"""What shapes and order tell whoever looks: phases and lengths. Open in every profile without padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from obfuscatune.attacks.base import Attacker, Finding, Target
from obfuscatune.attacks.knowledge import Knowledge
from obfuscatune.attacks.truth import Phase, Truth
from obfuscatune.attacks.view import WorkerView

PHASES: tuple[Phase, ...] = ("training", "prompt", "decoding")


@dataclass(frozen=True)
class ShapeGuess:
    """For each forward call of the first layer what was being done, and to how many tokens."""

    calls: Mapping[int, tuple[Phase, int]]


class Shapes:
    """Reads phase and length off the order of calls and their numbers of rows."""

    name = "lengths-and-phases"
    needs = Attacker.CLOSED
    target = Target.SHAPES
    measure = "share of passes whose phase and number of tokens are both told, mean over phases"
    source = "traffic analysis"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> ShapeGuess:
        """Rows less the shield rows, and gradients after it or not."""
        hidden = knowledge.scheme.shield_rows if knowledge.scheme.mixing else 0
        decoding = {call.index for call in view.decoding(0)}
        guess: dict[int, tuple[Phase, int]] = {}
        for number, call in enumerate(view.forward(0)):
            phase: Phase = "decoding" if call.index in decoding else "prompt"
            phase = "training" if number in view.trained_passes else phase
            guess[call.index] = (phase, call.count - hidden)
        return ShapeGuess(guess)

    def score(self, guess: ShapeGuess, truth: Truth) -> Finding:
        """Against what was done; chance takes the phase for granted to be one of three."""
        right = dict.fromkeys(PHASES, 0)
        total = dict(right)
        for index, (phase, length) in guess.calls.items():
            call = truth.calls[index]
            total[call.phase] += 1
            right[call.phase] += (phase, length) == (call.phase, len(call.tokens))
        seen = [phase for phase in PHASES if total[phase]]
        value = sum(right[phase] / total[phase] for phase in seen) / len(seen)
        return Finding(value, 1 / len(PHASES), 1.0, len(guess.calls), 0.5 / len(guess.calls) ** 0.5)
