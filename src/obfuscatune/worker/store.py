"""The matrices that a worker holds, each session's apart from every other's."""

import threading
from collections import OrderedDict
from typing import Literal, Protocol

import torch

from obfuscatune.wire.errors import QuotaExceeded, UnknownMatrix

WhenFull = Literal["refuse", "evict"]
Key = tuple[bytes, bytes]
"""Session key and matrix id. A matrix is found only by who stored it."""


class Dependent(Protocol):
    """What sessions keep besides matrices, within the same quota."""

    def forget_session(self, session: bytes) -> None:
        """Drop all of a session."""

    def holds_any(self, session: bytes) -> bool:
        """Whether anything of a session is there."""


class MatrixStore:
    """W* by (session, matrix id), within a quota for all sessions together. Safe from any thread."""

    def __init__(self, quota_bytes: int, when_full: WhenFull = "refuse") -> None:
        """`evict` drops what was not used for longest; its owner uploads it again when needed."""
        self.quota_bytes = quota_bytes
        self._when_full = when_full
        self._held: OrderedDict[Key, torch.Tensor] = OrderedDict()  # least recently used first
        self._reserved_bytes = 0
        self._dependents: list[Dependent] = []
        self._lock = threading.Lock()

    def depend(self, dependent: "Dependent") -> None:
        """Have what a session keeps elsewhere end with what it keeps here."""
        self._dependents.append(dependent)

    def reserve(self, size: int) -> None:
        """Claim room for a matrix of `size` bytes before it is received; `put` or `release` ends the claim.

        Raises:
            QuotaExceeded: there is none.
        """
        with self._lock:
            self._make_room(size)
            self._reserved_bytes += size

    def release(self, size: int) -> None:
        """Give back a claim of `reserve`."""
        with self._lock:
            self._reserved_bytes -= size

    def put(self, key: Key, matrix: torch.Tensor, *, reserved: int) -> None:
        """Hold `matrix` (p, q) under `key`, in place of what was there, and end the claim of `reserved` bytes.

        Raises:
            QuotaExceeded: it takes more room than was claimed for it, and there is none.
        """
        with self._lock:
            self._reserved_bytes -= reserved
            self._held.pop(key, None)
            self._make_room(matrix.nbytes)
            self._held[key] = matrix

    def get(self, key: Key) -> torch.Tensor:
        """The matrix (p, q) under `key`.

        Raises:
            UnknownMatrix: it was never stored, forgotten or evicted, or another session stored it.
        """
        with self._lock:
            if key not in self._held:
                raise UnknownMatrix("this session has no such matrix here (any longer)")
            self._held.move_to_end(key)
            return self._held[key]

    def forget(self, key: Key) -> None:
        """Drop one matrix; none is fine."""
        with self._lock:
            self._held.pop(key, None)

    def forget_session(self, session: bytes) -> None:
        """Drop all that a session stored."""
        with self._lock:
            for key in [key for key in self._held if key[0] == session]:
                del self._held[key]
        for dependent in self._dependents:
            dependent.forget_session(session)

    def holds_any(self, session: bytes) -> bool:
        """Whether anything of a session is here."""
        with self._lock:
            if any(key[0] == session for key in self._held):
                return True
        return any(dependent.holds_any(session) for dependent in self._dependents)

    @property
    def held_bytes(self) -> int:
        """Bytes of all matrices held, claims included."""
        with self._lock:
            return self._taken()

    def _taken(self) -> int:
        return self._reserved_bytes + sum(matrix.nbytes for matrix in self._held.values())

    def _make_room(self, size: int) -> None:
        if self._when_full == "evict" and self._reserved_bytes + size <= self.quota_bytes:
            while self._held and self._taken() + size > self.quota_bytes:
                self._held.popitem(last=False)
        taken = self._taken()
        if taken + size > self.quota_bytes:
            raise QuotaExceeded(
                f"{size} bytes do not fit: {taken} of {self.quota_bytes} are taken; "
                "raise --quota, or use --when-full evict"
            )
