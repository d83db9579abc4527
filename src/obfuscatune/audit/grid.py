"""Runs every attack on every profile of every model and seed, and holds the results."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from obfuscatune.audit.attackers import Variant, equip
from obfuscatune.audit.attacks.base import Attack, Attacker, Finding, NotRun, perform
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.registry import ATTACKS
from obfuscatune.audit.parties import MaskAccount, column
from obfuscatune.audit.record import Recording, parties_of, record_run
from obfuscatune.audit.scenario import Scenario
from obfuscatune.protocol.addresses import DeviceAddress
from obfuscatune.protocol.files import temporary_root

SIGMAS = 3.0
"""An attack within this many standard errors of chance is not counted as a success."""
SMALLEST_EFFECT = 0.02
"""The least `Cell.advantage` that counts as a success, however significant it is."""

Progress = Callable[[str], None]
"""Called with a few words on what begins or is done."""


@dataclass(frozen=True)
class Cell:
    """One attack on one profile of one model, with a result for each seed.

    `profile` is a column: under masks there is one for each party and one for both together (`parties.column`). The
    statistics are over the seeds on which the attack ran; without any they raise `StatisticsError`.
    """

    model: str
    profile: str
    attack: Attack
    results: tuple[Finding | NotRun, ...]

    @property
    def findings(self) -> list[Finding]:
        """The results of the seeds on which the attack ran."""
        return [result for result in self.results if isinstance(result, Finding)]

    @property
    def why_not(self) -> str:
        """Why the attack could not run, on the first such seed; empty if it ran on all seeds."""
        return next((result.why for result in self.results if isinstance(result, NotRun)), "")

    @property
    def value(self) -> float:
        """Mean score of the attack, in its own unit (`Finding.value`)."""
        return fmean(finding.value for finding in self.findings)

    @property
    def chance(self) -> float:
        """Mean score of guessing, in the same unit."""
        return fmean(finding.chance for finding in self.findings)

    @property
    def error(self) -> float:
        """Standard error of `value`: within the seeds or between them, whichever is larger."""
        findings = self.findings
        sampling = math.sqrt(fmean(finding.error**2 for finding in findings))
        between = stdev(finding.value for finding in findings) if len(findings) > 1 else 0.0
        return max(sampling, between) / math.sqrt(len(findings))

    @property
    def advantage(self) -> float:
        """Mean score on a scale from chance (0) to complete success (1)."""
        return fmean(finding.advantage for finding in self.findings)

    @property
    def succeeds(self) -> bool:
        """Whether the attack beats chance by `SIGMAS` standard errors and by `SMALLEST_EFFECT`."""
        if not self.findings or self.advantage < SMALLEST_EFFECT:
            return False
        towards_best = 1 if self.findings[0].best > self.chance else -1
        return towards_best * (self.value - self.chance) > SIGMAS * self.error


@dataclass(frozen=True)
class Grid:
    """All cells of an audit.

    Attributes:
        drift: `Scenario.drift` of each model, by name.
        masks: by model and profile, the account of the run that sent most under masks; none for profiles without.
    """

    cells: tuple[Cell, ...]
    seeds: int
    drift: dict[str, float]
    masks: Mapping[tuple[str, str], MaskAccount] = field(default_factory=dict)


def attacks_of(attacker: Attacker | None) -> list[Attack]:
    """The attacks that one kind of attacker runs; all attacks if None."""
    return [attack for attack in ATTACKS if attacker is None or attack.needs is attacker]


def columns_of(variant: Variant) -> list[str]:
    """The columns that a profile has: one, or one for each party and one for both together."""
    return [column(variant.name, party) for party in parties_of(variant.profile)]


def run_grid(
    scenarios: Sequence[Scenario],
    variants: Sequence[Variant],
    attacks: Sequence[Attack],
    seeds: int,
    *,
    recording: Progress,
    done: Progress,
    device: DeviceAddress | None = None,
) -> Grid:
    """Record one run for each scenario, variant and seed, and try every attack on it, for each of its columns.

    Args:
        recording: called before each recording.
        done: called after each recording and each attack on a column.
        device: the worker; None starts a process for each run.

    Raises:
        ObfuscaTuneError: as `record_run` does.
    """
    results: dict[tuple[str, str, str], list[Finding | NotRun]] = {}
    masks: dict[tuple[str, str], MaskAccount] = {}
    for scenario in scenarios:
        for variant in variants:
            for seed in range(seeds):
                recorded = _recorded(scenario, variant, seed, recording, done, device)
                for name, attack, result in _attacked(scenario, variant, recorded, attacks, seed, done):
                    results.setdefault((scenario.name, name, attack.name), []).append(result)
                if recorded.masks is not None:
                    before = masks.get((scenario.name, variant.name), recorded.masks)
                    masks[scenario.name, variant.name] = max(before, recorded.masks, key=lambda it: it.advantage)
    cells = tuple(
        Cell(scenario.name, name, attack, tuple(results[scenario.name, name, attack.name]))
        for scenario in scenarios
        for variant in variants
        for name in columns_of(variant)
        for attack in attacks
    )
    return Grid(cells, seeds, {scenario.name: scenario.drift for scenario in scenarios}, masks)


def _recorded(
    scenario: Scenario,
    variant: Variant,
    seed: int,
    recording: Progress,
    done: Progress,
    device: DeviceAddress | None,
) -> Recording:
    """Record one run."""
    run = f"{scenario.name}, {variant.name}, seed {seed}"
    recording(f"{run}: recording")
    with tempfile.TemporaryDirectory(prefix="obfuscatune-audit-", dir=temporary_root()) as folder:
        recorded = record_run(scenario, variant.profile, seed, Path(folder), device)
    done(f"{run}: recorded")
    return recorded


def _attacked(
    scenario: Scenario, variant: Variant, recorded: Recording, attacks: Sequence[Attack], seed: int, done: Progress
) -> Iterator[tuple[str, Attack, Finding | NotRun]]:
    """The result of each attack on each column of one run."""
    knowledge: dict[Attacker, Knowledge] = {}
    for party, view in recorded.views.items():
        name = column(variant.name, party)
        for attack in attacks:
            if attack.needs not in knowledge:
                knowledge[attack.needs] = equip(attack.needs, scenario, variant.profile, recorded.truth)
            result = perform(attack, view, knowledge[attack.needs], recorded.truth, seed)
            done(f"{scenario.name}, {name}, seed {seed}: {attack.name}")
            yield name, attack, result
