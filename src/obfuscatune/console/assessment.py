"""What a verification shows, link by link, and how far it reaches.

    asked -> hardware -> session -> program -> workers -> age

A check that holds is green where all that it rests on holds too. What a program says of itself is worth what is known
of the program; what a platform measured is worth what is known of the platform; simulated evidence is worth nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from obfuscatune.attest.checks import ANY, Check
from obfuscatune.attest.record import Verification

State = Literal["holds", "unfounded", "open", "past", "simulated", "fails"]
"""Holds; holds, and rests on something that does not; the policy accepts any value; held, and counts no more;
simulated; fails."""
_WORST: tuple[State, ...] = ("fails", "simulated", "past", "open", "unfounded", "holds")
LINKS = ("asked", "hardware", "session", "program", "workers", "age")
_ASKED = ("policy", "kind.", "require.", "once.", "gpus", "evidence")
_SESSION = ("nonce", "report_data")
_PROGRAM = ("measurement", "mr_", "rtmr", "pcr", "host_data", "mr_enclave", "isv_", "firmware")
_WORKERS = ("claims.workers", "claims.mask_workers", "claims.parties", "claims.profile")
_AGE = ("freshness", "reference_values")
_CARRIES = ("asked", "hardware", "session", "program")
"""Links that the ones after them rest on."""


@dataclass(frozen=True)
class Finding:
    """A check, and what it is worth."""

    name: str
    state: State
    expected: str
    found: str


@dataclass(frozen=True)
class Link:
    """The checks of one question."""

    name: str
    state: State
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Assessment:
    """All of it."""

    links: tuple[Link, ...]
    simulated: bool
    passed: bool

    @property
    def state(self) -> State:
        """Of the whole."""
        return _worst([link.state for link in self.links])


def assess(record: Verification, *, counts: bool = True) -> Assessment:
    """What the checks of a verification show. `counts`: see `assess_checks`."""
    return assess_checks(record.checks, simulated=record.simulated, counts=counts)


def assess_checks(checks: Sequence[Check], *, simulated: bool = False, counts: bool = True) -> Assessment:
    """What checks show. None of them, or one that fails, is not passed.

    Args:
        simulated: Whether the evidence was; checks of simulated evidence say so themselves.
        counts: Whether the verification still counts. What held once is not green any more where it does not.
    """
    simulated = simulated or any(it.name == "kind.simulated" or it.name.startswith("simulated") for it in checks)
    links: list[Link] = []
    founded = True
    for name in LINKS:
        own = [it for it in checks if link_of(it.name) == name]
        if not own:
            continue
        found = [_state(it, simulated=simulated, founded=founded) for it in own]
        shown: list[State] = [it if counts or it in ("fails", "simulated") else "past" for it in found]
        findings = tuple(Finding(it.name, state, it.expected, it.found) for it, state in zip(own, shown, strict=True))
        state = _worst([it.state for it in findings])
        links.append(Link(name, state, findings))
        if name in _CARRIES and state != "holds":
            founded = False
    return Assessment(tuple(links), simulated, bool(checks) and all(it.passed for it in checks))


def link_of(name: str) -> str:
    """The link that a check belongs to, by its name."""
    last = name.rpartition(".")[2]
    if name.startswith(_ASKED):
        return "asked"
    if name in _AGE:
        return "age"
    if name in _WORKERS:
        return "workers"
    if last in _SESSION:
        return "session"
    if name.startswith("claims.") or any(part.startswith(_PROGRAM) for part in name.split(".")[1:]):
        return "program"
    return "hardware"


def _state(check: Check, *, simulated: bool, founded: bool) -> State:
    if not check.passed:
        return "fails"
    if simulated and not check.name.startswith(("policy", "require.", "kind.")):
        return "simulated"
    if check.expected == ANY[0]:
        return "open"
    return "holds" if founded else "unfounded"


def _worst(states: Sequence[State]) -> State:
    return next((it for it in _WORST if it in states), "fails")
