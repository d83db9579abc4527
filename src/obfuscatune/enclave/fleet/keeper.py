"""The thread that looks after members that are silent or away."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Protocol

from obfuscatune.enclave.fleet.jobs import Job, now
from obfuscatune.enclave.fleet.link import MemberLink, State
from obfuscatune.errors import ConnectionLost, DeadlineExceeded, WireError
from obfuscatune.fleet.members import Member

LOOK_SECONDS = 0.1
"""Between two looks."""
SILENT_SECONDS = 0.4
"""After which, where a member has something to answer, all members are asked for a sign of life: where one hangs others
may, and what it held is not to be sent to those."""
PROBE_SECONDS = 1.0
"""Within which it must come: together with `SILENT_SECONDS` what dead members delay a request by."""
PROBED_EVERY = 2.0
"""Seconds between two probes of one member, at least: a product may just take long."""

Probe = Callable[[Member], None]
"""Connects anew, and raises where nobody answers within `PROBE_SECONDS`."""


class Kept(Protocol):
    """The fleet, as its keeper sees it."""

    @property
    def present(self) -> list[MemberLink]:
        """Of all members."""

    def try_again(self, link: MemberLink) -> None:
        """Join a member that is away."""

    def failed(self, link: MemberLink, error: Exception, jobs: list[Job]) -> None:
        """It cannot be asked anything now."""


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
        links = fleet.present
        for link in links:
            if link.state is State.AWAY and now() >= link.retry_at:
                fleet.try_again(link)
        if any(_is_silent(link) for link in links):
            for link in links:
                if (link.state is State.ACTIVE or _is_silent(link)) and now() >= self._probed.get(link, 0.0):
                    self._probed[link] = now() + PROBED_EVERY
                    threading.Thread(target=self._look_for_life, args=(link, link.busy_since), daemon=True).start()
        return True

    def _look_for_life(self, link: MemberLink, since: float | None) -> None:
        try:
            self._probe(link.member)
        except (ConnectionLost, DeadlineExceeded) as error:
            fleet = self._fleet()
            if link.busy_since != since or fleet is None:
                return  # it was heard of meanwhile
            if link.state is State.ACTIVE and not any(
                it.state is State.ACTIVE for it in fleet.present if it is not link
            ):
                return  # nobody else could be asked: it may come to life, or another back
            link.reason = "it does not answer"
            if since is None:
                fleet.failed(link, error, link.take_jobs())
            else:
                link.interrupt()
        except WireError:
            return  # somebody answers


def _is_silent(link: MemberLink) -> bool:
    since = link.busy_since
    return since is not None and now() - since > SILENT_SECONDS


def _run(reference: weakref.ref[Keeper], over: threading.Event) -> None:
    while not over.wait(LOOK_SECONDS):
        keeper = reference()
        if keeper is None or not keeper.look():
            return
        del keeper
