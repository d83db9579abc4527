"""Who takes how much of what all peers of a worker share: its memory, or its disk.

A *peer* is who connects: a TLS key, a user of this host, or an address (`SocketTransport.peer_id`). It may open many
sessions; what is shared is divided among peers, so that nobody gains by opening more of them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from obfuscatune.errors import QuotaExceeded

GRAIN = 64
"""What other peers take is rounded up to this part of the whole before it counts, so that sizes that are refused do not
tell it more exactly."""


class SessionKey(NamedTuple):
    """What a session is known by in a worker. Another peer that says the same id has another session."""

    peer: str
    digest: bytes
    """SHA-256 of the session's id (32 bytes); the id itself is a secret and is not kept."""


NOBODY = SessionKey("", b"")
"""Whose is what an earlier worker left on the disk: it gives way to anybody, before anything else."""
Named = TypeVar("Named")


class Claim:
    """Room that a session has claimed, until `release`; to release it twice is to release it once."""

    def __init__(self, quota: Quota, session: SessionKey, size: int) -> None:
        self.session = session
        self.size = size
        self._quota: Quota | None = quota

    def release(self) -> None:
        """Give the room back."""
        quota, self._quota = self._quota, None
        if quota is not None:
            quota._taken(self.session, -self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Quota:
    """Counts bytes by session and by peer, and decides who gives way. Safe from any thread."""

    def __init__(self, total: int, of_one_peer: int | None = None) -> None:
        """`total` bytes for all peers together, of which one may take `of_one_peer` (all if None)."""
        self.total = total
        self.of_one_peer = total if of_one_peer is None else min(total, of_one_peer)
        self._by_session: Counter[SessionKey] = Counter()
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Bytes claimed by all."""
        with self._lock:
            return self._by_session.total()

    def of_session(self, session: SessionKey) -> int:
        """Bytes that one session has claimed."""
        with self._lock:
            return self._by_session[session]

    def claim(self, session: SessionKey, size: int) -> Claim:
        """Claim `size` bytes.

        Raises:
            QuotaExceeded: there is no room for them.
        """
        with self._lock:
            self._check(session.peer, size, self._by_peer())
            self._add(session, size)
        return Claim(self, session, size)

    def giving_way(self, session: SessionKey, size: int, held: Iterable[tuple[Named, Claim]]) -> list[Named]:
        """Which of the `held` must go, so that `size` bytes more can be claimed.

        A peer within its share (what there is, divided by the peers that take any of it) makes those give way that
        have more than theirs. Beyond it, a peer makes room among what is its own.

        Args:
            session: who wants them.
            size: how many.
            held: what may go, and its claim; that which is to go first comes first.

        Raises:
            QuotaExceeded: there would be no room even so. Then nothing is to go.
        """
        left, gone = list(held), []
        with self._lock:
            taken = self._by_peer()
        while (shortage := self._shortage(session.peer, size, taken)) is not None:
            for owners in self._givers(session.peer, size, taken):
                place = next((at for at, (_, claim) in enumerate(left) if claim.session.peer in owners), None)
                if place is not None:
                    break
            else:
                raise QuotaExceeded(shortage)
            name, claim = left.pop(place)
            taken[claim.session.peer] -= claim.size
            gone.append(name)
        return gone

    def hand_over(self, claim: Claim, session: SessionKey) -> None:
        """What was claimed by one session is another's from here on."""
        with self._lock:
            self._add(claim.session, -claim.size)
            self._add(session, claim.size)
            claim.session = session

    def _givers(self, peer: str, size: int, taken: Counter[str]) -> list[set[str]]:
        """Whose things are to give way to `peer`; where these have none, whose then."""
        if taken[peer] + size > self.of_one_peer:
            return [{peer}]
        peers = {other for other, has in taken.items() if has} - {NOBODY.peer} | {peer}
        share = (self.total - self.total // GRAIN) // len(peers)
        larger = {other for other in peers if taken[other] > share} if taken[peer] + size <= share else set()
        return [{NOBODY.peer}, larger, {peer}]

    def _by_peer(self) -> Counter[str]:
        taken: Counter[str] = Counter()
        for session, size in self._by_session.items():
            taken[session.peer] += size
        return taken

    def _check(self, peer: str, size: int, taken: Counter[str]) -> None:
        shortage = self._shortage(peer, size, taken)
        if shortage is not None:
            raise QuotaExceeded(shortage)

    def _shortage(self, peer: str, size: int, taken: Counter[str]) -> str | None:
        """Why `size` bytes more do not fit; it says nothing of other peers but that they are there."""
        own = taken[peer]
        if own + size > self.of_one_peer:
            return f"{size} bytes do not fit: you have {own} of the {self.of_one_peer} that one peer may have"
        grain = max(self.total // GRAIN, 1)
        others = -(-(taken.total() - own) // grain) * grain
        if others + own + size > self.total:
            return f"{size} bytes do not fit: you have {own}, and other peers too much of the rest"
        return None

    def _taken(self, session: SessionKey, size: int) -> None:
        with self._lock:
            self._add(session, size)

    def _add(self, session: SessionKey, size: int) -> None:
        self._by_session[session] += size
        if not self._by_session[session]:
            del self._by_session[session]
