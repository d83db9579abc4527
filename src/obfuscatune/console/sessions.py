"""Who may use a console: whoever opened its one-time link. Everything is in memory, and ends with the process.

link (printed) -> code, once -> session: an id in a cookie, and a token that every change must carry
"""

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

SESSION_SECONDS = 12 * 3600
MOST_SESSIONS = 16
SECONDS_BETWEEN_LINKS = 10.0
CODE_CHARACTERS = 64
"""More are not looked at."""


@dataclass(frozen=True)
class Session:
    """A browser that opened a link."""

    csrf: str = field(repr=False)
    """What every request that changes something must carry in a header."""
    until: float
    """By the console's clock."""


class Sessions:
    """Links and sessions of one console. Safe from any thread.

    Args:
        clock: Seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._code: bytes | None = None
        self._made = -SECONDS_BETWEEN_LINKS
        self._sessions: dict[bytes, Session] = {}

    def new_code(self) -> str:
        """The code of a new link. An older one that nobody used counts no more."""
        code = secrets.token_urlsafe(32)
        with self._lock:
            self._code, self._made = _hashed(code), self._clock()
        return code

    def renewed_code(self) -> str | None:
        """A new code where the last one is used; None where one is still out, or was made a moment ago."""
        with self._lock:
            if self._code is not None or self._clock() - self._made < SECONDS_BETWEEN_LINKS:
                return None
        return self.new_code()

    def enter(self, code: str) -> str | None:
        """Use a link up.

        Returns:
            The id of a new session, which no request can have chosen; None where the code is not the link's.
        """
        given = _hashed(code[:CODE_CHARACTERS])
        with self._lock:
            if self._code is None or not hmac.compare_digest(given, self._code):
                return None
            self._code = None
            now = self._clock()
            alive = {key: it for key, it in self._sessions.items() if now < it.until}
            while len(alive) >= MOST_SESSIONS:
                del alive[next(iter(alive))]
            session_id = secrets.token_urlsafe(32)
            alive[_hashed(session_id)] = Session(secrets.token_urlsafe(32), now + SESSION_SECONDS)
            self._sessions = alive
            return session_id

    def find(self, session_id: str | None) -> Session | None:
        """The session of an id; None where there is none, or it is over."""
        if not session_id:
            return None
        with self._lock:
            found = self._sessions.get(_hashed(session_id[:CODE_CHARACTERS]))
        return found if found is not None and self._clock() < found.until else None

    def leave(self, session_id: str | None) -> None:
        """End a session."""
        if session_id:
            with self._lock:
                self._sessions.pop(_hashed(session_id[:CODE_CHARACTERS]), None)


def _hashed(text: str) -> bytes:
    """Looked up by digest: how long a comparison takes tells nothing of what is kept."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
