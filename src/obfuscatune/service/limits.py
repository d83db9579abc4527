"""How much of a service one owner may take: requests and tokens in a minute, completions at a time.

Token buckets, which are full at first and refill steadily. Nothing here touches disk or network; the clock is given.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from obfuscatune.errors import Overloaded
from obfuscatune.service.settings import Limits

_UPLOADS = 2
"""Of one owner at a time."""
_MOST_OWNERS = 4096
"""That are remembered. One that is forgotten has not asked for long: its buckets are full."""


class Busy(Overloaded):
    """Asked for more than an owner may have now.

    What to do:
        Ask again after `retry_after_s` seconds; OpenAI's clients do so by themselves.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass
class _Bucket:
    """Holds at most `size`; refills within a minute."""

    size: float
    level: float
    at: float

    def refill(self, now: float) -> None:
        self.level = min(self.size, self.level + (now - self.at) * self.size / 60)
        self.at = now

    def wait_for(self, amount: float) -> float:
        """Seconds until `amount` can be taken; what is larger than the bucket is taken when it is full."""
        return max(0.0, min(amount, self.size) - self.level) * 60 / self.size


@dataclass
class _Account:
    requests: _Bucket
    tokens: _Bucket
    running: int = 0
    uploads: int = 0


class RateLimits:
    """The accounts of all owners. Safe from any thread."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._accounts: dict[str, _Account] = {}
        self._lock = threading.Lock()

    def request(self, owner: str) -> None:
        """Count a request.

        Raises:
            Busy: there were too many within the last minute.
        """
        with self._lock:
            bucket = self._account(owner).requests
            self._take(bucket, 1, f"{self._limits.requests_per_minute} requests a minute")

    @contextmanager
    def completion(self, owner: str, tokens: int) -> Iterator[None]:
        """Count a completion of at most so many tokens, and the time that it takes.

        Raises:
            Busy: there were too many tokens within the last minute, or too many completions are under way.
        """
        with self._lock:
            account = self._account(owner)
            if account.running >= self._limits.concurrent_requests:
                raise Busy(f"at most {self._limits.concurrent_requests} completions at a time", 1.0)
            self._take(account.tokens, tokens, f"{self._limits.tokens_per_minute} tokens a minute")
            account.running += 1
        try:
            yield
        finally:
            with self._lock:
                account.running -= 1

    @contextmanager
    def upload(self, owner: str) -> Iterator[None]:
        """Count an upload while it comes: each takes memory.

        Raises:
            Busy: two of this owner's are under way.
        """
        with self._lock:
            account = self._account(owner)
            if account.uploads >= _UPLOADS:
                raise Busy(f"at most {_UPLOADS} uploads at a time", 1.0)
            account.uploads += 1
        try:
            yield
        finally:
            with self._lock:
                account.uploads -= 1

    def _take(self, bucket: _Bucket, amount: float, rule: str) -> None:
        bucket.refill(self._clock())
        wait = bucket.wait_for(amount)
        if wait > 0:
            raise Busy(f"at most {rule}", wait)
        bucket.level -= amount

    def _account(self, owner: str) -> _Account:
        account = self._accounts.pop(owner, None)
        if account is None:
            now = self._clock()
            requests, tokens = (float(it) for it in (self._limits.requests_per_minute, self._limits.tokens_per_minute))
            account = _Account(_Bucket(requests, requests, now), _Bucket(tokens, tokens, now))
            while len(self._accounts) >= _MOST_OWNERS:
                idle = next((name for name, it in self._accounts.items() if not it.running and not it.uploads), None)
                if idle is None:
                    break
                del self._accounts[idle]
        self._accounts[owner] = account  # the last one asked, last
        return account
