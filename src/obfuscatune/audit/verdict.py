"""For whom a profile is enough, in words that follow from the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from obfuscatune.attacks.base import Attacker, Target
from obfuscatune.audit.grid import Cell, Grid

CONTROL = "identity"
SECRETS = (Target.TOKENS, Target.WEIGHTS)
PROMISED: dict[tuple[str, Attacker], tuple[Target, ...]] = {
    ("private", Attacker.CLOSED): SECRETS,
    ("private", Attacker.PUBLIC_TEXT): SECRETS,
    ("guarded", Attacker.CLOSED): SECRETS,
    ("guarded", Attacker.PUBLIC_TEXT): SECRETS,
    ("guarded", Attacker.PUBLIC_BASE): (Target.TOKENS,),
}
"""What a profile promises to hide from whom (docs/threat-model.md); the others promise nothing."""
EXCEPTED: dict[str, frozenset[str]] = {"private": frozenset({"equal-tokens-decoding"})}
"""What it does not promise to anyone, because the audit found it open: attacks by name."""


@dataclass(frozen=True)
class Verdict:
    """What one attacker learns of one profile, over all models."""

    profile: str
    attacker: Attacker
    promised: tuple[Target, ...]
    open: tuple[Cell, ...]
    """Attacks on tokens or weights that beat chance."""
    linked: tuple[Cell, ...]
    """Attacks on structure that do."""
    withstood: int
    """Attacks on tokens or weights that ran and did not beat chance, though they have the power to."""
    powerless: int
    """Those that did not beat chance even where nothing is hidden (`identity`, where it was audited too)."""
    not_run: int

    @property
    def holds(self) -> bool:
        """Whether something was tried and nothing on tokens or weights beat chance."""
        return not self.open and self.withstood > 0

    @property
    def text(self) -> str:
        """One or two sentences."""
        who = f"{self.profile} against {_WHO[self.attacker]}"
        excepted = EXCEPTED.get(self.profile, frozenset())
        concerned = [cell for cell in self.open if cell.attack.target in self.promised]
        if any(cell.attack.name not in excepted for cell in concerned):
            first = f"{who}: THE PROMISE IS BROKEN. {_list(self.open)}."
        elif concerned:
            first = (
                f"{who}: enough for what it promises, as far as {_count(self.withstood)} on tokens and weights can "
                f"tell. Not promised, and open: {_list(self.open)}."
            )
        elif self.open and self.promised:
            first = f"{who}: enough for {_and(self.promised)}, not for the rest. {_list(self.open)}."
        elif self.open:
            first = f"{who}: not enough. {_list(self.open)}."
        elif self.withstood:
            first = f"{who}: enough, as far as {_count(self.withstood)} on tokens and weights can tell."
        else:
            first = f"{who}: nothing is known, no attack on tokens or weights had its chance."
        rest = f" Also open: {_list(self.linked)}." if self.linked else ""
        missing = f" Could not be run, so not withstood: {_count(self.not_run)}." if self.not_run else ""
        weak = f" Too weak here even against identity, so not withstood: {_count(self.powerless)}."
        return first + rest + missing + (weak if self.powerless else "")


_WHO = {
    Attacker.CLOSED: "who knows the algorithm alone",
    Attacker.PUBLIC_TEXT: "who has text of the same kind",
    Attacker.PUBLIC_BASE: "who has the public base model",
    Attacker.KNOWN_PLAINTEXT: "who knows the plain rows of some calls",
}


def verdicts(grid: Grid) -> list[Verdict]:
    """One for each profile and attacker, in the grid's order."""
    profiles = list(dict.fromkeys(cell.profile for cell in grid.cells))
    attackers = [it for it in Attacker if any(cell.attack.needs is it for cell in grid.cells)]
    return [_verdict(grid, profile, attacker) for profile in profiles for attacker in attackers]


def exceeding(grid: Grid, limit: float) -> list[Cell]:
    """Attacks on tokens or weights that beat chance, with more than that advantage."""
    return [it for it in grid.cells if it.attack.target in SECRETS and it.succeeds and it.advantage > limit]


def _verdict(grid: Grid, profile: str, attacker: Attacker) -> Verdict:
    cells = [cell for cell in grid.cells if cell.profile == profile and cell.attack.needs is attacker]
    secret = [cell for cell in cells if cell.attack.target in SECRETS]
    failed = [cell for cell in secret if cell.findings and not cell.succeeds]
    powerless = [cell for cell in failed if not _has_power(grid, cell)]
    return Verdict(
        profile,
        attacker,
        PROMISED.get((profile, attacker), ()),
        tuple(cell for cell in secret if cell.succeeds),
        tuple(cell for cell in cells if cell.attack.target is Target.STRUCTURE and cell.succeeds),
        len(failed) - len(powerless),
        len(powerless),
        sum(not cell.findings for cell in cells),
    )


def _has_power(grid: Grid, cell: Cell) -> bool:
    """Whether the attack beats chance on `identity`, as far as that was audited."""
    control = [it for it in grid.cells if (it.model, it.profile, it.attack) == (cell.model, CONTROL, cell.attack)]
    return not any(it.findings and not it.succeeds for it in control)


def _list(cells: Sequence[Cell]) -> str:
    """Each attack once, where it did best."""
    best: dict[str, Cell] = {}
    for cell in cells:
        known = best.get(cell.attack.name)
        if known is None or cell.advantage > known.advantage:
            best[cell.attack.name] = cell
    return ", ".join(f"{name} {it.value:.2f} (chance {it.chance:.2f}; {it.model})" for name, it in best.items())


def _and(targets: Sequence[Target]) -> str:
    return " and ".join(targets)


def _count(number: int) -> str:
    return "one attack" if number == 1 else f"{number} attacks"
