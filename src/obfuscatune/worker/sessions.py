"""Who is connected. A session outlives its connections by a while: an enclave that comes back finds its matrices."""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from obfuscatune.wire.errors import WorkerRefused
from obfuscatune.wire.limits import IDLE_SECONDS


def session_key(session_id: bytes) -> bytes:
    """What a session is known by in here: SHA-256 of its id (32 bytes). The id itself is a secret and is not kept."""
    return hashlib.sha256(b"obfuscatune/session" + session_id).digest()


def session_label(key: bytes) -> str:
    """What a session is called in logs and transcripts: 12 hex digits that lead back to nothing."""
    return key.hex()[:12]


@dataclass
class _Session:
    connections: int = 0
    left_at: float = field(default_factory=time.monotonic)


class Sessions:
    """The sessions of a worker, at most `most` of them. Safe from any thread."""

    def __init__(self, most: int, on_expiry: Callable[[bytes], None], idle_seconds: float = IDLE_SECONDS) -> None:
        """`on_expiry` is given the key of each session that ends."""
        self._most = most
        self._on_expiry = on_expiry
        self._idle_seconds = idle_seconds
        self._sessions: dict[bytes, _Session] = {}
        self._lock = threading.Lock()

    def enter(self, key: bytes) -> None:
        """A connection of the session `key` begins.

        Raises:
            WorkerRefused: it is a new session and there are too many.
        """
        with self._lock:
            self._expire()
            if key not in self._sessions and len(self._sessions) >= self._most:
                raise WorkerRefused(
                    f"{self._most} sessions are open and no more are taken: try later, or raise --max-sessions"
                )
            self._sessions.setdefault(key, _Session()).connections += 1

    def leave(self, key: bytes, *, keep: bool) -> None:
        """A connection of the session ends; unless there is something to `keep` for it, so does the session."""
        with self._lock:
            session = self._sessions[key]
            session.connections -= 1
            session.left_at = time.monotonic()
            if session.connections == 0 and not keep:
                del self._sessions[key]

    def _expire(self) -> None:
        now = time.monotonic()
        for key, session in list(self._sessions.items()):
            if session.connections == 0 and now - session.left_at > self._idle_seconds:
                del self._sessions[key]
                self._on_expiry(key)
