"""Who is connected, and whose turn it is to compute.

A session outlives its connections by a while: an enclave that comes back finds its matrices. One session computes at a
time; of those that wait, one of the peer that has computed least.
"""

import contextlib
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from obfuscatune.errors import ConnectionLost, WorkerRefused
from obfuscatune.protocol.limits import IDLE_SECONDS, MAX_SESSION_CONNECTIONS, REPLACED_AFTER_SECONDS
from obfuscatune.worker.quota import SessionKey

HangUp = Callable[[], None]
"""Ends a connection, from any thread."""


def session_key(peer: str, session_id: bytes) -> SessionKey:
    """What the session with that id (32 bytes) of that peer is known by."""
    return SessionKey(peer, hashlib.sha256(b"obfuscatune/session" + session_id).digest())


def session_label(key: SessionKey) -> str:
    """What a session is called in logs and transcripts: 12 hex digits that lead back to nothing."""
    return key.digest.hex()[:12]


class Holdings(Protocol):
    """What sessions keep while nobody is connected."""

    def held_by(self, session: SessionKey) -> int:
        """Bytes of a session."""

    def forget_session(self, session: SessionKey) -> None:
        """Drop all of a session."""


@dataclass(eq=False)
class Session:
    """One session, for as long as it has a place."""

    key: SessionKey
    connections: list[HangUp] = field(default_factory=list)
    """Oldest first."""
    active_at: float = field(default_factory=time.monotonic)

    def touch(self) -> None:
        """Something was asked."""
        self.active_at = time.monotonic()


class Sessions:
    """The sessions of a worker, at most `most` of them. Safe from any thread."""

    def __init__(self, most: int, holdings: Holdings, idle_seconds: float = IDLE_SECONDS) -> None:
        """`holdings` is told of each session that ends; without a connection one ends after `idle_seconds`."""
        self._most = most
        self._holdings = holdings
        self._idle_seconds = idle_seconds
        self._sessions: dict[SessionKey, Session] = {}
        self._lock = threading.Lock()

    def enter(self, key: SessionKey, hang_up: HangUp) -> Session:
        """A connection of the session `key` begins; it can be ended by `hang_up`.

        Raises:
            WorkerRefused: it is a new session, and none gives way to it.
        """
        with self._lock:
            self._expire()
            if key not in self._sessions:
                self._make_place(key.peer)
            session = self._sessions.setdefault(key, Session(key))
            session.connections.append(hang_up)
            session.touch()
            if len(session.connections) > MAX_SESSION_CONNECTIONS:
                _end_connection(session.connections.pop(0))
            return session

    def leave(self, session: Session, hang_up: HangUp) -> None:
        """A connection ends; and with it the session, unless that has others, or something is held for it."""
        with self._lock:
            with contextlib.suppress(ValueError):  # it was told to end
                session.connections.remove(hang_up)
            session.touch()
            if session.connections:
                return
            has_place = self._sessions.get(session.key) is session
            if not has_place or not self._holdings.held_by(session.key):
                self._end(session)

    def _expire(self) -> None:
        now = time.monotonic()
        for session in list(self._sessions.values()):
            if not session.connections and now - session.active_at > self._idle_seconds:
                self._end(session)

    def _make_place(self, peer: str) -> None:
        """Have a session give way to a new one of `peer`, where all places are taken.

        A peer that would still have no more sessions than another one takes a place of that; else a session gives way
        that was idle for a while: its own, or one without a connection.

        Raises:
            WorkerRefused: there is none.
        """
        if len(self._sessions) < self._most:
            return
        now = time.monotonic()
        numbers = Counter(session.key.peer for session in self._sessions.values())

        def gives_way(session: Session) -> bool:
            owner, idle = session.key.peer, now - session.active_at > REPLACED_AFTER_SECONDS
            if owner == peer:
                return idle or not session.connections
            return numbers[owner] > numbers[peer] + 1 or (idle and not session.connections)

        def rank(session: Session) -> tuple[int, bool, int, float]:
            held = self._holdings.held_by(session.key)
            return -numbers[session.key.peer], bool(session.connections), held, session.active_at

        candidates = [session for session in self._sessions.values() if gives_way(session)]
        if not candidates:
            raise WorkerRefused(
                f"{numbers[peer]} sessions of yours are open and no more are taken now: close one, try later, or have "
                "the worker started with a larger --max-sessions"
            )
        self._end(min(candidates, key=rank))

    def _end(self, session: Session) -> None:
        """Drop what it holds. Its connections, if any, are told, and drop what they still bring when they leave."""
        if self._sessions.get(session.key) is session:
            del self._sessions[session.key]
        for hang_up in session.connections:
            _end_connection(hang_up)
        if session.key not in self._sessions:
            self._holdings.forget_session(session.key)


def _end_connection(hang_up: HangUp) -> None:
    with contextlib.suppress(ConnectionLost):  # it was ending already
        hang_up()


MOST_PRODUCTS = 1 << 36
"""Multiplications of one turn, about a second on a processor: a larger request is computed by parts, and others get
their turn in between."""


class Turns:
    """Start-time fair queueing (Goyal et al., SIGCOMM 1996) over peers. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: list[str] = []  # in the order in which they came
        self._computing: str | None = None
        self._spent: dict[str, float] = {}  # in seconds, since nobody waited
        self._began_at = 0.0  # the turn of who is computing

    def of(self, peer: str) -> "Turn":
        """A turn of that peer: to be waited for on the way into a `with`, and had while that lasts."""
        return Turn(self, peer)

    def begin(self, peer: str) -> None:
        """Wait until it is the turn of that peer."""
        with self._lock:
            if self._computing is None and not self._waiting:
                self._spent.setdefault(peer, 0.0)
            else:
                self._wait(peer)
            self._computing, self._began_at = peer, time.monotonic()

    def end(self, peer: str) -> None:
        """The turn of that peer is over."""
        with self._lock:
            self._computing = None
            if self._waiting:
                self._spent[peer] += time.monotonic() - self._began_at
                self._changed.notify_all()
            else:
                self._spent.clear()

    def _wait(self, peer: str) -> None:
        present = [self._spent[other] for other in (*self._waiting, self._computing) if other is not None]
        if peer != self._computing and peer not in self._waiting:  # to stay away is not to save turns up
            self._spent[peer] = max(self._spent.get(peer, 0.0), min(present, default=0.0))
        self._waiting.append(peer)
        self._changed.wait_for(lambda: self._computing is None and self._next() == peer)
        self._waiting.remove(peer)

    def _next(self) -> str:
        return min(self._waiting, key=self._spent.__getitem__)


class Turn:
    """One turn of a peer; see `Turns.of`."""

    __slots__ = ("_peer", "_turns")

    def __init__(self, turns: Turns, peer: str) -> None:
        self._turns, self._peer = turns, peer

    def __enter__(self) -> None:
        self._turns.begin(self._peer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turns.end(self._peer)
