"""What arrival times tell where numbers of rows do not: how long the enclave took for its own part of a pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.attacks.knowledge import Knowledge
from obfuscatune.attacks.scoring import area_under_curve
from obfuscatune.attacks.truth import Truth
from obfuscatune.attacks.view import WorkerView


@dataclass(frozen=True)
class DurationGuess:
    """Calls that begin a pass of generation, and how long the enclave computed within it, in ns."""

    calls: tuple[int, ...]
    durations: Tensor


class Timing:
    """Takes the longer passes of generation for those over prompts."""

    name = "timing"
    needs = Attacker.CLOSED
    target = Target.SHAPES
    measure = "AUC: passes over prompts against decoding steps, by what the enclave took between reply and request"
    source = "traffic analysis"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> DurationGuess:
        """Time that the worker waited before each call but the first, whose wait is the user's."""
        begun: list[int] = []
        durations: list[float] = []
        for call in view.calls:
            if call.layer == 0 and not call.transposed:
                begun.append(call.index)
                durations.append(0.0)
            elif not call.transposed:
                durations[-1] += call.awaited_ns
        kept = [number for number in range(len(begun)) if number not in view.trained_passes]
        if not any(durations[number] for number in kept):
            raise CannotRun("the transcript holds no times, or nothing was generated")
        return DurationGuess(
            tuple(begun[number] for number in kept), torch.tensor([durations[number] for number in kept])
        )

    def score(self, guess: DurationGuess, truth: Truth) -> Finding:
        """Against what was done."""
        prompts = torch.tensor([truth.calls[call].phase == "prompt" for call in guess.calls])
        area, error = area_under_curve(guess.durations, prompts)
        medians = {
            f"median {name} us": float(guess.durations[chosen].median()) / 1000
            for name, chosen in (("prompt", prompts), ("decoding", ~prompts))
        }
        return Finding(area, 0.5, 1.0, len(guess.calls), error, medians)
