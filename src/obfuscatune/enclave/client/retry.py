"""How long to insist on a worker that fails, what to say when that is over, when not to ask it again; and counts."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Self

from obfuscatune.errors import BadMagic, BadReply, ConnectionLost, UnsupportedVersion, WireError, WrongProduct


@dataclass(frozen=True)
class RetryPolicy:
    """Bounds of insistence."""

    attempts: int = 4
    """Exchanges that may fail in a row, without one product in between."""
    patience_s: float = 60.0
    """How long to keep trying to reach a worker that is gone."""
    backoff_s: float = 0.05
    """First pause between two tries; it doubles, up to `longest_backoff_s`."""
    longest_backoff_s: float = 2.0


class Refusal:
    """Whether the worker may still be asked. Once it may not, it never may again: a new link is what it takes."""

    def __init__(self) -> None:
        self._reason: WireError | None = None

    @property
    def is_declared(self) -> bool:
        """Whether the worker may be asked no more."""
        return self._reason is not None

    def declare(self, reason: WireError) -> None:
        """From now on; the first reason stays."""
        self._reason = self._reason or reason

    def check(self) -> None:
        """Return where the worker may be asked.

        Raises:
            WireError: it may not; of the same type each time, which is that of the reason.
        """
        if self._reason is not None:
            raise type(self._reason)(
                f"{self._reason}. The worker is asked nothing any more: find out why, then load or protect the model "
                "anew, which draws new secrets"
            ) from self._reason


class Refusing(AbstractContextManager[None]):
    """See `WorkerClient.refusing`. One for all threads: it keeps nothing."""

    def __init__(self, refusal: Refusal, refuse: Callable[[WireError], None]) -> None:
        """
        Args:
            refusal: of the link.
            refuse: declares it, and wakes those that wait.
        """
        self._refusal, self._refuse = refusal, refuse

    def __enter__(self) -> None:
        """Nothing is prepared."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (BadReply, WrongProduct)):
            self._refuse(error)
            self._refusal.check()


class Insistence:
    """Counts the failures on the way to one result."""

    def __init__(self, policy: RetryPolicy, products: int) -> None:
        self._policy = policy
        self._failures = 0
        self._products = products
        self._unreachable_since: float | None = None
        self._pause = policy.backoff_s

    def after(self, error: WireError, *, connected: bool, products: int) -> None:
        """Return when it is time to try again.

        Args:
            error: what went wrong.
            connected: whether there was a connection when it did.
            products: how many products this link has ever received; one more than last time starts the count anew.

        Raises:
            WireError: `error`, with how often and how long was tried, when that was enough.
        """
        if products > self._products:
            self._products, self._failures, self._pause = products, 0, self._policy.backoff_s
            self._unreachable_since = None
        now = time.monotonic()
        if not connected and isinstance(error, (UnsupportedVersion, BadMagic)):
            raise error  # it will not speak our version, or protocol, by being asked again
        if not connected and isinstance(error, ConnectionLost):
            if self._unreachable_since is None:
                self._unreachable_since = now
            if now - self._unreachable_since + self._pause > self._policy.patience_s:
                raise ConnectionLost(
                    f"{error}; gave up after {self._policy.patience_s:g} s: start the worker (again), then resume"
                ) from error
        else:
            self._unreachable_since = None
            self._failures += 1
            if self._failures >= self._policy.attempts:
                raise type(error)(
                    f"{error}; gave up after {self._failures} attempts in a row: look at the worker's own messages"
                ) from error
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, self._policy.longest_backoff_s)


@dataclass
class ClientStats:
    """Totals since the link was opened."""

    crossings: int = 0
    """Requests to multiply that were answered."""
    bytes_sent: int = 0
    """Bytes to the worker, headers and uploads included."""
    bytes_received: int = 0
    """Bytes from the worker, headers included."""
    seconds_waiting: float = 0.0
    """Time spent waiting for replies and receiving them."""
    uploads: int = 0
    """Matrices sent; those that the worker had already are not among them."""
    bytes_uploaded: int = 0
    """Bytes of these matrices."""
    served: int = 0
    """Matrices that the worker had already, of its own or of an earlier run: nothing of them was sent."""
    verified: int = 0
    """Products that were held against secret vectors."""
    reconnects: int = 0
    """Connections made after the first."""
    retries: int = 0
    """Requests to multiply that were sent again."""

    def snapshot(self) -> Self:
        """A copy that stands still."""
        return replace(self)

    def since(self, earlier: Self) -> Self:
        """What was added since the snapshot `earlier`."""
        before = asdict(earlier)
        return type(self)(**{name: value - before[name] for name, value in asdict(self).items()})
