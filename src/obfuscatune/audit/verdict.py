"""What each attacker learns of each profile, and which profile to take, in words that follow from the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from obfuscatune.audit.attacks.base import Attacker, Target
from obfuscatune.audit.grid import Cell, Grid
from obfuscatune.audit.parties import Party, column, of_column

CONTROL = "identity"
SECRETS = (Target.TOKENS, Target.WEIGHTS)
_OF_PRIVATE: dict[Attacker, tuple[Target, ...]] = {Attacker.CLOSED: SECRETS, Attacker.PUBLIC_TEXT: SECRETS}
_OF_ONE_PARTY: dict[Attacker, tuple[Target, ...]] = {
    Attacker.CLOSED: (*SECRETS, Target.STRUCTURE),
    Attacker.PUBLIC_TEXT: (*SECRETS, Target.STRUCTURE),
    Attacker.PUBLIC_BASE: (Target.TOKENS, Target.STRUCTURE),
}
PROMISED: dict[str, dict[Attacker, tuple[Target, ...]]] = {
    "private": _OF_PRIVATE,
    column("guarded", Party.COMPUTE): _OF_ONE_PARTY,
    column("guarded", Party.MASK): _OF_ONE_PARTY,
    column("guarded", Party.BOTH): _OF_PRIVATE,
}
"""What a profile promises to hide from whom, by column (docs/threat-model.md); the others promise nothing. `guarded`
promises it of each of its two parties alone, and of both together what `private` promises. Who has the public base is
promised nothing of the weights, and by `guarded` alone that tokens are hidden. Which texts are alike, one party alone
must not learn either."""
_LINKS_TOKENS = frozenset({"equal-tokens-decoding", "moments-decoding", "shared-rows", "mask-gaps"})
EXCEPTED: dict[str, frozenset[str]] = {"private": _LINKS_TOKENS, column("guarded", Party.BOTH): _LINKS_TOKENS}
"""What it does not promise to anyone, because it was found open: attacks by name."""


class State(StrEnum):
    """Of one profile against one attacker."""

    BROKEN = "promise broken"
    OPEN = "open, not promised"
    HOLDS = "no attack succeeds"
    UNKNOWN = "not known"


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
    def state(self) -> State:
        """Whether a promise is broken, and else whether anything was found."""
        if self.broken:
            return State.BROKEN
        if self.open:
            return State.OPEN
        return State.HOLDS if self.withstood else State.UNKNOWN

    @property
    def broken(self) -> tuple[Cell, ...]:
        """What succeeds against a promise."""
        excepted = EXCEPTED.get(self.profile, frozenset())
        found = (*self.open, *self.linked)
        return tuple(it for it in found if it.attack.target in self.promised and it.attack.name not in excepted)

    @property
    def strongest(self) -> Cell | None:
        """The attack on tokens or weights that gets furthest; None where none succeeds."""
        return max(self.open, key=lambda cell: cell.advantage, default=None)

    @property
    def text(self) -> str:
        """A few sentences."""
        profile, party = of_column(self.profile)
        who = f"{profile}{_SEEN_BY[party]} against {_WHO[self.attacker]}"
        match self.state:
            case State.BROKEN:
                first = f"{who}: THE PROMISE IS BROKEN. {_list((*self.open, *self.broken))}."
            case State.OPEN:
                first = f"{who}: open, and not promised: {_list(self.open)}."
            case State.HOLDS:
                first = f"{who}: none of {_count(self.withstood)} on tokens and weights succeeds."
            case State.UNKNOWN:
                first = f"{who}: nothing is known, no attack on tokens or weights had its chance."
        others = [it for it in self.linked if it not in self.broken]
        linked = f" Texts are told apart or matrices aligned by {_list(others)}." if others else ""
        missing = f" Could not be run, so not withstood: {_count(self.not_run)}." if self.not_run else ""
        weak = f" Too weak here even against identity, so not withstood: {_count(self.powerless)}."
        return first + linked + missing + (weak if self.powerless else "")


def advice(grid: Grid) -> str:
    """Which of the audited profiles to take, in one sentence."""
    found = [it for it in verdicts(grid) if it.promised]
    closed = _kept([it for it in found if it.attacker in _OF_PRIVATE])
    public = _kept([it for it in found if it.attacker not in _OF_PRIVATE])
    if closed:
        never_public = f"take {_named(closed[0])}, which keeps what it promises as far as these attacks can tell"
    elif any(it.attacker in _OF_PRIVATE for it in found):
        never_public = "none of the audited profiles kept its promise here"
    else:
        never_public = "nothing was audited that promises to hide anything"
    if public:
        published = f"take {_named(public[0])}, which hides its tokens as far as these attacks can tell"
    elif any(it.attacker not in _OF_PRIVATE for it in found):
        published = "none of the audited profiles was found to hide its tokens"
    else:
        published = "no promise to hide its tokens was put to the test here"
    return (
        f"If your base model was never public, {never_public}; if it is a fine-tune of a published model, {published}."
    )


def _kept(found: Sequence[Verdict]) -> list[str]:
    """The profiles that kept their promises in each of their columns."""
    kept = dict.fromkeys(of_column(it.profile)[0] for it in found)
    for it in found:
        if it.state in (State.BROKEN, State.UNKNOWN):
            kept.pop(of_column(it.profile)[0], None)
    return [*kept]


def _named(profile: str) -> str:
    """A profile, with what it takes for granted."""
    return f"{profile}, whose two workers must not collude" if column(profile, Party.BOTH) in PROMISED else profile


def not_run(grid: Grid) -> Iterator[tuple[str, str]]:
    """Each attack that could not be run, with where, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell in grid.cells:
        if cell.why_not:
            reasons.setdefault((cell.attack.name, cell.why_not), []).append(f"{cell.profile} on {cell.model}")
    for (attack, why), where in reasons.items():
        yield f"{attack} ({'; '.join(where)})", why


_WHO = {
    Attacker.CLOSED: "who knows the algorithm alone",
    Attacker.PUBLIC_TEXT: "who has text of the same kind",
    Attacker.PUBLIC_BASE: "who has the public base model",
    Attacker.KNOWN_PLAINTEXT: "who knows the plain rows of some calls",
}


_SEEN_BY = {
    Party.COMPUTE: "",
    Party.MASK: " (the mask worker alone)",
    Party.BOTH: " (both workers, if they collude)",
}


def verdicts(grid: Grid) -> list[Verdict]:
    """One for each profile and attacker, in the grid's order."""
    profiles = list(dict.fromkeys(cell.profile for cell in grid.cells))
    attackers = [it for it in Attacker if any(cell.attack.needs is it for cell in grid.cells)]
    return [_verdict(grid, profile, attacker) for profile in profiles for attacker in attackers]


def exceeding(grid: Grid, limit: float) -> list[Cell]:
    """Attacks on tokens or weights that beat chance, with more than that advantage.

    What both parties see together is left out: that they do not collude is what such a profile takes for granted.
    """
    apart = [it for it in grid.cells if of_column(it.profile)[1] is not Party.BOTH]
    return [it for it in apart if it.attack.target in SECRETS and it.succeeds and it.advantage > limit]


def _verdict(grid: Grid, profile: str, attacker: Attacker) -> Verdict:
    cells = [cell for cell in grid.cells if cell.profile == profile and cell.attack.needs is attacker]
    secret = [cell for cell in cells if cell.attack.target in SECRETS]
    failed = [cell for cell in secret if cell.findings and not cell.succeeds]
    powerless = [cell for cell in failed if not _has_power(grid, cell)]
    return Verdict(
        profile,
        attacker,
        PROMISED.get(profile, {}).get(attacker, ()),
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


def _count(number: int) -> str:
    return "one attack" if number == 1 else f"{number} attacks"
