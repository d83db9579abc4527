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
