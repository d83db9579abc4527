"""One deadline for a whole request, however many system calls it takes."""

import time

from obfuscatune.wire.errors import DeadlineExceeded
from obfuscatune.wire.limits import SLOWEST_BYTES_PER_SECOND


class Deadline:
    """A moment on the monotonic clock, handed down through every call that may wait."""

    __slots__ = ("_at", "_seconds")

    def __init__(self, seconds: float | None) -> None:
        """`seconds` from now; None never passes."""
        self._seconds = seconds
        self._at = None if seconds is None else time.monotonic() + seconds

    def remaining(self) -> float | None:
        """Seconds left, None for ever.

        Raises:
            DeadlineExceeded: none are left.
        """
        if self._at is None:
            return None
        left = self._at - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"expected an answer within {self._seconds:g} s, none came")
        return left


NEVER = Deadline(None)


def transfer_seconds(size: int) -> float:
    """What `size` bytes may take on the slowest link that is still waited for."""
    return size / SLOWEST_BYTES_PER_SECOND
