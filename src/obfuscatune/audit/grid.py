"""Every attack on every profile of every model, over seeds, and what came of it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from obfuscatune.audit.attackers import Variant, equip
from obfuscatune.audit.attacks.base import Attack, Attacker, Finding, NotRun, perform
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.registry import ATTACKS
from obfuscatune.audit.record import record_run
from obfuscatune.audit.scenario import Scenario
from obfuscatune.protocol.files import temporary_root

SIGMAS = 3.0
"""Standard errors from chance within which a figure is noise."""
SMALLEST_EFFECT = 0.02
"""Of the way from chance to complete success: less is of no use to anybody, however sure it is."""

Progress = Callable[[str], None]
"""Called when something is done, with what comes next."""


@dataclass(frozen=True)
class Cell:
    """One attack on one profile of one model: a result for each seed."""

    model: str
    profile: str
    attack: Attack
    results: tuple[Finding | NotRun, ...]

    @property
    def findings(self) -> list[Finding]:
        """Of the seeds on which it ran."""
        return [result for result in self.results if isinstance(result, Finding)]

    @property
    def why_not(self) -> str:
        """Why it did not run on some seed; empty where it ran on all."""
        return next((result.why for result in self.results if isinstance(result, NotRun)), "")

    @property
    def value(self) -> float:
        """Mean over seeds."""
        return fmean(finding.value for finding in self.findings)

    @property
    def chance(self) -> float:
        """Mean over seeds."""
        return fmean(finding.chance for finding in self.findings)

    @property
    def error(self) -> float:
        """Standard error of `value`: by sampling or between the seeds, whichever is larger."""
        findings = self.findings
        sampling = math.sqrt(fmean(finding.error**2 for finding in findings))
        between = stdev(finding.value for finding in findings) if len(findings) > 1 else 0.0
        return max(sampling, between) / math.sqrt(len(findings))

    @property
    def advantage(self) -> float:
        """From chance, 0, to complete success, 1; mean over seeds."""
        return fmean(finding.advantage for finding in self.findings)

    @property
    def succeeds(self) -> bool:
        """Whether it is better than chance by more than noise, and by enough to matter."""
        if not self.findings or self.advantage < SMALLEST_EFFECT:
            return False
        towards_best = 1 if self.findings[0].best > self.chance else -1
        return towards_best * (self.value - self.chance) > SIGMAS * self.error


@dataclass(frozen=True)
class Grid:
    """All cells, and what they were made of."""

    cells: tuple[Cell, ...]
    seeds: int
    drift: dict[str, float]
    """How far each model's secret weights are from its public base."""


def attacks_of(attacker: Attacker | None) -> list[Attack]:
    """The attacks that one kind of attacker runs; all of them if None."""
    return [attack for attack in ATTACKS if attacker is None or attack.needs is attacker]


def run_grid(
    scenarios: Sequence[Scenario],
    variants: Sequence[Variant],
    attacks: Sequence[Attack],
    seeds: int,
    progress: Progress,
) -> Grid:
    """Record each run once, and try every attack on it.

    Raises:
        ObfuscaTuneError: as `record_run` does.
    """
    results: dict[tuple[str, str, str], list[Finding | NotRun]] = {}
    for scenario in scenarios:
        for variant in variants:
            for seed in range(seeds):
                where = f"{scenario.name}, {variant.name}, seed {seed}"
                for attack, result in _one_run(scenario, variant, attacks, seed, progress, where):
                    results.setdefault((scenario.name, variant.name, attack.name), []).append(result)
    cells = tuple(
        Cell(scenario.name, variant.name, attack, tuple(results[scenario.name, variant.name, attack.name]))
        for scenario in scenarios
        for variant in variants
        for attack in attacks
    )
    return Grid(cells, seeds, {scenario.name: scenario.drift for scenario in scenarios})


def _one_run(
    scenario: Scenario, variant: Variant, attacks: Sequence[Attack], seed: int, progress: Progress, where: str
) -> list[tuple[Attack, Finding | NotRun]]:
    with tempfile.TemporaryDirectory(prefix="obfuscatune-audit-", dir=temporary_root()) as folder:
        recording = record_run(scenario, variant.profile, seed, Path(folder))
    progress(f"{where}: recorded")
    held: dict[Attacker, Knowledge] = {}
    results = []
    for attack in attacks:
        if attack.needs not in held:
            held[attack.needs] = equip(attack.needs, scenario, variant.profile, recording.truth)
        results.append((attack, perform(attack, recording.view, held[attack.needs], recording.truth, seed)))
        progress(f"{where}: {attack.name}")
    return results
