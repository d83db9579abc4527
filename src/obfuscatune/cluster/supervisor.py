"""Keeps a fleet as it should be: signs certificates, has workers started, and says who the members are."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from obfuscatune.cluster.authority import Authority
from obfuscatune.cluster.node import FAILED, NEW, RUNNING, Report
from obfuscatune.errors import ObfuscaTuneError, UntrustedPeer
from obfuscatune.fleet.listing import format_list
from obfuscatune.fleet.members import Member, Party
from obfuscatune.protocol.authority import check_issued, load_authority, load_one

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_OUT_OF_SIGHT = 30.0
"""A worker whose place cannot be reached stays on the list for this time: it may still answer enclaves."""
MOST_AT_A_TIME = 32
"""Places that are looked at together, since one that does not answer takes seconds."""


class Place(Protocol):
    """Where an engine placed, or will place, one worker: a `Node`, perhaps on another machine."""

    name: str

    def report(self) -> Report | None:
        """How its worker is; None while the engine has nowhere to run it, or cannot reach it."""

    def request(self) -> bytes:
        """Its request for a certificate."""

    def start(self, certificate: bytes) -> None:
        """Have its worker started."""

    def close(self) -> None:
        """End its worker; the engine puts a new one in the place, where it can."""


class Engine(Protocol):
    """What runs places."""

    @property
    def places(self) -> Sequence[Place]:
        """One for each worker, in a fixed order."""

    def close(self) -> None:
        """Let go of the places."""


@dataclass(frozen=True)
class Identity:
    """Whose fleet it is."""

    operator: str
    party: Party
    memory: int | None
    """Of each worker, in bytes."""


class Supervisor:
    """Looks at each place again and again. `publish` is given the list whenever it changes."""

    def __init__(
        self,
        engine: Engine,
        authority: Authority,
        identity: Identity,
        *,
        publish: Callable[[bytes], None],
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._authority, self._identity = engine, authority, identity
        self._publish, self._say = publish, say
        self._issuer = load_authority(authority.certificate)
        self._published = b""
        self._pool = ThreadPoolExecutor(MOST_AT_A_TIME, "places")
        self._seen: dict[str, tuple[float, Report]] = {}
        self._said: dict[str, str] = {}
        self.running = 0
        """Workers that answered at the last look."""

    def run(self, over: threading.Event, looked: Callable[[], None]) -> None:
        """Look until `over` is set; `looked` is called after each look."""
        with self._pool:
            while not over.is_set():
                self.look()
                looked()
                over.wait(SECONDS_BETWEEN_LOOKS)

    def look(self) -> None:
        """Look at each place once, do what it lacks, and publish the list if it has changed.

        A list without members is not published: enclaves go on with those that they know.
        """
        members, devices, self.running = [], [], 0
        for report in self._pool.map(self._settle, self._engine.places):
            if report is None or report.address is None or report.certificate is None:
                continue
            self.running += report.state == RUNNING
            it = self._identity
            members.append(Member(report.address, report.certificate, it.operator, it.party, it.memory))
            devices.append(report.device)
        if not members:
            return
        data = format_list(members, devices)
        if data != self._published:
            self._published = data
            self._publish(data)

    def _settle(self, place: Place) -> Report | None:
        """Do what a place lacks, say how it is, and return its report if its worker belongs on the list."""
        try:
            report = place.report()
            if report is not None and report.state == NEW:
                place.start(self._authority.issue(place.request(), f"{self._identity.operator} {place.name}"))
                report = place.report()
            if report is not None and report.certificate is not None:
                check_issued(load_one(report.certificate), self._issuer)
        except UntrustedPeer:  # it was started by another supervisor, under another authority
            place.close()
            report = None
        except ObfuscaTuneError as error:
            self._tell(place, str(error))
            return None
        self._tell(place, _in_words(report))
        if report is None:
            when, report = self._seen.get(place.name, (0.0, None))
            return report if time.monotonic() < when + SECONDS_OUT_OF_SIGHT else None
        self._seen[place.name] = time.monotonic(), report
        return None if report.state == FAILED else report

    def _tell(self, place: Place, words: str) -> None:
        if self._said.get(place.name) != words:
            self._said[place.name] = words
            self._say(f"{place.name}: {words}")


def _in_words(report: Report | None) -> str:
    if report is None:
        return "no machine yet, or out of sight"
    where = "" if report.address is None else f" at {report.address}"
    why = f" ({report.reason})" if report.reason and report.state != RUNNING else ""
    again = f", restarts: {report.restarts}" if report.restarts else ""
    return f"{report.state}{where}{again}{why}"
