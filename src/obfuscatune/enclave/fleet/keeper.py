"""The thread that looks after members that are silent or away."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Protocol

from obfuscatune.enclave.fleet.jobs import now
from obfuscatune.enclave.fleet.link import MemberLink, State
from obfuscatune.errors import ConnectionLost, DeadlineExceeded, WireError
from obfuscatune.fleet.members import Member

LOOK_SECONDS = 0.1
"""Between two looks."""
SILENT_SECONDS = 0.7
"""After which a member that has something to answer is asked for a sign of life."""
PROBE_SECONDS = 1.0
"""Within which it must come: together with `SILENT_SECONDS` what a dead member can delay a request by."""

Probe = Callable[[Member], None]
"""Connects anew, and raises where nobody answers within `PROBE_SECONDS`."""


class Kept(Protocol):
    """The fleet, as its keeper sees it."""

    @property
    def links(self) -> list[MemberLink]:
        """Of all members."""

    def try_again(self, link: MemberLink) -> None:
        """Join a member that is away."""


class Keeper:
    """Keeps the fleet alive no longer than anybody else does."""

    def __init__(self, fleet: Kept, probe: Probe) -> None:
        """
        Args:
            fleet: whose members are looked after.
            probe: looks whether a member is alive; a product may just take long.
        """
        self._fleet, self._probe = weakref.ref(fleet), probe
        self.begin_in_child()

    def begin_in_child(self) -> None:
        """In a forked child: the thread is the parent's."""
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._probed: weakref.WeakKeyDictionary[MemberLink, float] = weakref.WeakKeyDictionary()
        """When each is to be probed next, at the earliest."""

    def start(self) -> None:
        """Begin to look, unless it has begun."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=_run, args=(weakref.ref(self), self._over), name="fleet", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def look(self) -> bool:
        """At every member once; whether there is a fleet still."""
        fleet = self._fleet()
        if fleet is None:
            return False
        for link in fleet.links:
            if link.state is State.AWAY and now() >= link.retry_at:
                fleet.try_again(link)
            since = link.busy_since
            if since is not None and now() - since > SILENT_SECONDS and now() >= self._probed.get(link, 0.0):
                self._probed[link] = now() + SILENT_SECONDS + PROBE_SECONDS
                threading.Thread(target=self._look_for_life, args=(link, since), daemon=True).start()
        return True

    def _look_for_life(self, link: MemberLink, since: float) -> None:
        try:
            self._probe(link.member)
        except (ConnectionLost, DeadlineExceeded):
            if link.busy_since == since:
                link.reason = "it does not answer"
                link.interrupt()
        except WireError:
            return  # somebody answers


def _run(reference: weakref.ref[Keeper], over: threading.Event) -> None:
    while not over.wait(LOOK_SECONDS):
        keeper = reference()
        if keeper is None or not keeper.look():
            return
        del keeper
