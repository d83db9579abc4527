"""The matrices that a worker holds, each session's apart from every other's."""

import threading
from collections import Counter, OrderedDict
from typing import Literal, Protocol

import torch

from obfuscatune.wire.errors import QuotaExceeded, UnknownMatrix
from obfuscatune.wire.limits import MAX_MATRICES
from obfuscatune.wire.messages import ErrorCode
from obfuscatune.worker.declined import Declined
from obfuscatune.worker.quota import Claim, Quota, SessionKey

WhenFull = Literal["refuse", "evict"]
Key = tuple[SessionKey, bytes]
"""Session and matrix id. A matrix is found only by who stored it."""


class Dependent(Protocol):
    """What sessions keep besides matrices, within the same quota."""

    def forget_session(self, session: SessionKey) -> None:
        """Drop all of a session."""


class MatrixStore:
    """W* by (session, matrix id), within a quota. Safe from any thread."""

    def __init__(self, quota: Quota, when_full: WhenFull = "refuse") -> None:
        """`evict` drops what was not used for longest (`Quota.giving_way` says whose); its owner uploads it again."""
        self.quota = quota
        self._when_full = when_full
        self._held: OrderedDict[Key, tuple[torch.Tensor, Claim]] = OrderedDict()  # least recently used first
        self._numbers: Counter[SessionKey] = Counter()
        self._dependents: list[Dependent] = []
        self._lock = threading.Lock()

    def depend(self, dependent: "Dependent") -> None:
        """Have what a session keeps elsewhere end with what it keeps here."""
        self._dependents.append(dependent)

    def check(self, session: SessionKey, size: int) -> None:
        """Whether `reserve` would find room. Nothing is claimed, and nothing has to give way.

        Raises:
            QuotaExceeded: it would not.
            Declined: the session has too many matrices.
        """
        with self._lock:
            self._giving_way(session, size)

    def reserve(self, session: SessionKey, size: int) -> Claim:
        """Claim room for `size` bytes before they are received; end the claim by `put`, or release it.

        Raises:
            QuotaExceeded: there is none.
            Declined: the session has too many matrices.
        """
        with self._lock:
            return self._claim(session, size)

    def put(self, key: Key, matrix: torch.Tensor, claim: Claim) -> None:
        """Hold `matrix` (p, q) under `key`, in place of what was there; the room it takes replaces the `claim`.

        Raises:
            QuotaExceeded: it takes more room than was claimed for it, and there is none.
        """
        with self._lock:
            self._drop(key)
            claim.release()
            own = self._claim(key[0], matrix.nbytes)
            self._held[key] = matrix, own
            self._numbers[key[0]] += 1

    def get(self, key: Key) -> torch.Tensor:
        """The matrix (p, q) under `key`.

        Raises:
            UnknownMatrix: it was never stored, forgotten or evicted, or another session stored it.
        """
        with self._lock:
            if key not in self._held:
                raise UnknownMatrix("this session has no such matrix here (any longer)")
            self._held.move_to_end(key)
            return self._held[key][0]

    def forget(self, key: Key) -> None:
        """Drop one matrix; none is fine."""
        with self._lock:
            self._drop(key)

    def forget_session(self, session: SessionKey) -> None:
        """Drop all that a session stored."""
        with self._lock:
            for key in [key for key in self._held if key[0] == session]:
                self._drop(key)
        for dependent in self._dependents:
            dependent.forget_session(session)

    def held_by(self, session: SessionKey) -> int:
        """Bytes of a session, claims included."""
        return self.quota.of_session(session)

    @property
    def held_bytes(self) -> int:
        """Bytes of all sessions, claims included."""
        return self.quota.taken

    def _claim(self, session: SessionKey, size: int) -> Claim:
        for key in self._giving_way(session, size):
            self._drop(key)
        return self.quota.claim(session, size)

    def _giving_way(self, session: SessionKey, size: int) -> list[Key]:
        if self._numbers[session] >= MAX_MATRICES:
            raise Declined(ErrorCode.LIMIT, f"a session has at most {MAX_MATRICES} matrices: forget some")
        evictable = self._held.items() if self._when_full == "evict" else ()
        try:
            return self.quota.giving_way(session, size, [(key, claim) for key, (_, claim) in evictable])
        except QuotaExceeded as error:
            raise QuotaExceeded(
                f"{error}; load fewer matrices, or have the worker started with another --quota, --peer-quota or "
                "--when-full"
            ) from None

    def _drop(self, key: Key) -> None:
        _, claim = self._held.pop(key, (None, None))
        if claim is not None:
            claim.release()
            self._numbers[key[0]] -= 1
            if not self._numbers[key[0]]:
                del self._numbers[key[0]]
