"""What the shapes, the order and the times of requests tell whoever looks: phases and lengths.

Shapes are open in every profile without padding; times tell how long the enclave took for its own part of a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.scoring import Phase, Truth, area_under_curve
from obfuscatune.audit.attacks.view import WorkerView

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


@dataclass(frozen=True)
class DurationGuess:
    """Calls that begin a pass of generation, how long the enclave computed within it (ns), and how long that seems."""

    calls: tuple[int, ...]
    durations: Tensor
    scores: Tensor


class Timing:
    """Takes for prompts the passes of generation in which the enclave took longer than in others."""

    name = "timing"
    needs = Attacker.CLOSED
    target = Target.SHAPES
    measure = "AUC: passes over prompts against decoding steps, by what the enclave took between reply and request"
    source = "traffic analysis"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> DurationGuess:
        """How long the worker waited before each call but the first of a pass, whose wait is the user's."""
        passes: list[tuple[int, list[float]]] = []
        for call in view.calls:
            if call.layer == 0 and not call.transposed:
                passes.append((call.index, []))
            elif not call.transposed:
                passes[-1][1].append(float(call.awaited_ns))
        kept = [it for number, it in enumerate(passes) if number not in view.trained_passes]
        waits = torch.tensor([waits for _, waits in kept])  # (passes, layers - 1)
        if not waits.any():
            raise CannotRun("the transcript holds no times, or nothing was generated")
        away = waits - waits.median(0).values
        scores = (away / away.abs().median(0).values.clamp_min(1.0)).median(1).values  # whatever else the host did
        return DurationGuess(tuple(index for index, _ in kept), waits.sum(1), scores)

    def score(self, guess: DurationGuess, truth: Truth) -> Finding:
        """Against what was done."""
        prompts = torch.tensor([truth.calls[call].phase == "prompt" for call in guess.calls])
        area, error = area_under_curve(guess.scores, prompts)
        medians = {
            f"median {name} us": float(guess.durations[chosen].median()) / 1000
            for name, chosen in (("prompt", prompts), ("decoding", ~prompts))
        }
        return Finding(area, 0.5, 1.0, len(guess.calls), error, medians)
