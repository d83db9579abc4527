"""What the rest of the enclave sees of a worker: store a matrix, multiply by it, forget it."""

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Self

import torch

from obfuscatune.enclave.client.adapters import AdapterRequest
from obfuscatune.enclave.client.connection import ClientConnection
from obfuscatune.enclave.client.interface import PendingProduct, WorkerLink
from obfuscatune.enclave.client.requests import (
    MatrixSource,
    ProductInParts,
    ProductRequest,
    Request,
    StoredMatrix,
    check_finite,
)
from obfuscatune.enclave.client.retry import ClientStats, Refusing, RetryPolicy
from obfuscatune.enclave.client.scheduler import Scheduler
from obfuscatune.errors import ConfigError, ProtectionError
from obfuscatune.process import begin_anew_in_children
from obfuscatune.protocol.endpoints import check_tls, connect, parse_address
from obfuscatune.protocol.limits import MIB
from obfuscatune.protocol.tls import PinnedTls, TlsConfig
from obfuscatune.protocol.transport import Deadline, Transport

LOOK_SECONDS = 1.0
"""Longest wait of a thread for another's reading, before it looks for itself."""
MOST_PARTS, PART_BYTES, PART_ROWS = 4, MIB, 64
"""Requests that are made of one whose worker is elsewhere, at most; and bytes there and back, and rows, that each of
them has at least. With several the link is busy both ways while the worker computes."""
OPENING_SECONDS = 5.0
"""How long `open` waits for a worker that has never been seen: it may just be starting, or the address is wrong."""


class WorkerClient(WorkerLink):
    """A worker, as the enclave sees it. Safe from any thread; they take turns, but not in waiting for a reply.

    A connection belongs to one process: a forked child that uses the link connects anew, in a session of its own, and
    has the matrices sent again that it multiplies by. What had been asked for before the fork is the parent's.
    """

    def __init__(
        self, connect: Callable[[], Transport], *, deadline_s: float = 120.0, retry: RetryPolicy | None = None
    ) -> None:
        """Nothing is connected before the first request.

        Args:
            connect: makes a fresh transport each time it is called.
            deadline_s: seconds from sending a request to the last byte of its reply.
            retry: bounds of insistence.
        """
        self._driver = Scheduler(connect, deadline_s, retry or RetryPolicy())
        self._refusing = Refusing(self._driver.refusal, self._driver.refuse)
        self._take_turns()
        self._closed = False
        self._owned: list[Callable[[], None]] = []
        self._end = weakref.finalize(self, _end, self._driver, self._owned)
        begin_anew_in_children(self)

    def begin_in_child(self) -> None:
        """See `forks.Forkable`."""
        self._take_turns()  # the parent's lock may have been held by a thread that is not here
        self._driver.begin_in_child()

    def _take_turns(self) -> None:
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        """Notified when a thread that read has stopped reading, or has read a reply."""
        self._is_listened = False
        """Whether a thread waits for the next reply, whoever it is for."""
        self._waiting = 0
        """Threads that wait for replies, without the lock."""
        self._user: int | None = None
        """The thread that submitted, while there is but one."""
        self._driver.is_to_read = None

    @property
    def stats(self) -> ClientStats:
        """What went over the link so far; it goes on counting."""
        return self._driver.stats

    @property
    def computes_apart(self) -> bool:
        """Whether the worker computes on other cores than this process's, so that both can work at the same time."""
        return self._driver.computes_apart

    @classmethod
    def open(
        cls,
        address: str,
        *,
        tls: TlsConfig | None = None,
        deadline_s: float = 120.0,
        retry: RetryPolicy | None = None,
        allow_plain_tcp: bool = False,
    ) -> Self:
        """A link to a worker, connected.

        Args:
            address: unix:/path or tcp:host:port.
            tls: our certificate and the worker's, for tcp that leaves this machine.
            deadline_s: seconds from sending a request to the last byte of its reply.
            retry: bounds of insistence.
            allow_plain_tcp: leave this machine without TLS. Unsafe: whoever is on the way reads and changes what
                passes.

        Raises:
            ConfigError: the address cannot be used, or leaves this machine without TLS.
            WireError: nobody answers there, or not as a worker.
        """
        parsed = parse_address(address)
        check_tls(parsed, tls=tls is not None, plain_tcp=allow_plain_tcp)
        pinned = None if tls is None else PinnedTls(tls, server=False)
        policy = retry or RetryPolicy()
        client = cls(lambda: connect(parsed, Deadline(deadline_s), pinned), deadline_s=deadline_s, retry=policy)
        opening = replace(policy, patience_s=min(policy.patience_s, OPENING_SECONDS))
        client._driver.drive(lambda: client._driver.connected, opening)
        return client

    def store(
        self,
        matrix_id: bytes,
        source: MatrixSource,
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
        tensor: torch.Tensor | None = None,
        widths: tuple[int, ...] = (),
    ) -> None:
        """Have the worker hold W_star under `matrix_id`.

        Args:
            matrix_id: 16 bytes that mean nothing to the worker.
            source: makes W_star again, should the worker lose it.
            shape: (p, q) of W_star.
            dtype: of W_star.
            tensor: W_star where it is at hand: uploaded now, and not kept.
            widths: of each published weight, where W_star is nothing but such weights side by side: a worker that has
                them need not be sent any.

        Raises:
            QuotaExceeded: the worker has no room.
            ProtectionError: the link is closed.
            WireError: see `multiply`.
        """
        matrix = StoredMatrix(matrix_id, source, shape, dtype, at_hand=tensor, widths=widths)
        driver = self._driver
        driver.refusal.check()
        with self._lock:
            self._refuse_if_closed()
            driver.matrices[matrix_id] = driver.missing[matrix_id] = matrix
            driver.leaving.pop(matrix_id, None)
            try:
                driver.drive(lambda: matrix_id not in driver.missing)
            finally:
                matrix.at_hand = None
                driver.missing.pop(matrix_id, None)
            if matrix.refused is not None:
                raise matrix.refused

    def allocate(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for rows that are to be multiplied: shared with the worker where that can be, then nothing is copied.

        A contiguous (rows, cols) matrix on the CPU with arbitrary elements. It is the worker's to read and to change
        from now on: only what it may know may be laid there, and nothing may be read back.
        """
        allocator = self._driver.allocator
        allocated = None if allocator is None else allocator.allocate(rows, cols, dtype)
        return torch.empty(rows, cols, dtype=dtype) if allocated is None else allocated

    def submit(
        self,
        matrix_id: bytes,
        rows: torch.Tensor,
        *,
        transpose: bool,
        reply_dtype: torch.dtype | None = None,
        known_finite: bool = False,
        product_unchecked: bool = False,
    ) -> PendingProduct:
        """As `multiply`, but return once it is sent; `Pending.result` waits. `rows` must not change until then.

        Args:
            known_finite: the caller has made sure that `rows` contain neither NaN nor infinity.
            product_unchecked: it will make sure of the product, once that lies in memory of its own.
        """
        driver = self._driver
        driver.refusal.check()
        with self._lock:
            self._refuse_if_closed()
            matrix = driver.matrices.get(matrix_id)
            if matrix is None:
                raise ConfigError("no matrix was stored under this id: store it first")
            if not known_finite:
                check_finite(rows)
            self._note_user()
            pending = ProductRequest(
                matrix,
                rows.detach() if rows.requires_grad else rows,
                transpose,
                reply_dtype or rows.dtype,
                self._finish,
                product_unchecked,
            )
            parts = pending.in_parts(self._parts_of(pending))
            for part in parts:
                self._send(part)
            return pending if len(parts) == 1 else ProductInParts(pending, parts)

    def _send(self, request: ProductRequest) -> None:
        self._driver.waiting.append(request)
        self._drive_for(request, lambda: request not in self._driver.waiting)

    def _parts_of(self, request: ProductRequest) -> int:
        """How many requests to make of one: no more where the worker computes on these cores, or little travels."""
        if not self._driver.computes_apart or self._driver.allocator is not None:
            return 1
        size = request.nbytes + math.prod(request.shape) * request.dtype.itemsize
        return max(1, min(MOST_PARTS, size // PART_BYTES, request.shape[0] // PART_ROWS))

    def order(self, order: AdapterRequest) -> torch.Tensor | None:
        """Ask for something else than a product of a stored matrix, and wait: `adapters.py` says what there is.

        Returns:
            The matrix that was asked for, on the CPU, the caller's own; None where none was.

        Raises:
            AdapterLost: the worker lost what it alone had.
            WireError: see `multiply`.
        """
        self._driver.refusal.check()
        with self._lock:
            self._refuse_if_closed()
            self._driver.waiting.append(order)
            self._drive_for(order, lambda: order.done)
        if order.error is not None:
            raise order.error
        return order.product

    def forget(self, matrix_id: bytes) -> None:
        """Have the worker drop a matrix, now or when it is next connected. One that was never stored is fine."""
        driver = self._driver
        driver.refusal.check()
        with self._lock:
            if driver.matrices.pop(matrix_id, None) is None or self._closed:
                return
            driver.leaving[matrix_id] = None
            if driver.connected:
                driver.drive(lambda: matrix_id not in driver.leaving)

    @contextmanager
    def broken_off(self) -> Iterator[None]:
        """Within it, what waits for the worker in other threads fails at once; afterwards the link connects anew."""
        self._driver.break_off()
        try:
            yield
        finally:
            self._driver.broken_off = False

    def refusing(self) -> AbstractContextManager[None]:
        """Within it products are judged: after one that is refused, the worker is asked nothing any more.

        Every request of any thread, those under way among them, raises an error of the same type from then on. Else a
        worker could ask, product by product, what the enclave's secret vectors do not see.
        """
        return self._refusing

    def own(self, close: Callable[[], None]) -> None:
        """Have `close` called once the link is closed: it ends the worker that was started for it."""
        self._owned.append(close)

    def close(self) -> None:
        """Have the worker forget all of this session, where it can still be reached, and disconnect. Twice is once.

        Nothing can be asked afterwards. A link that nothing refers to any more closes by itself.
        """
        with self._lock:
            self._closed = True
            self._changed.wait_for(lambda: not self._waiting)  # else they would connect anew
            self._end()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ProtectionError(
                "this model's link to its worker is closed, as close() and the end of a `with` leave it: "
                "load or protect the model again"
            )

    def _finish(self, pending: ProductRequest) -> None:
        """Called by `Pending.result`: drive until this one is done."""
        self._driver.refusal.check()
        with self._lock:
            if not pending.done:
                self._refuse_if_closed()  # by another thread, while this one was sending
            self._drive_for(pending, lambda: pending.done)

    def _drive_for(self, request: Request, done: Callable[[], bool]) -> None:
        try:
            self._driver.drive(done)
        except BaseException:
            self._driver.give_up(request)
            raise
        finally:
            self._changed.notify_all()  # a reply was read that was another's, or nobody reads any more

    def _note_user(self) -> None:
        """From the second thread on, waiting is shared; for one alone that would be two system calls more a request."""
        own = threading.get_ident()
        if self._user is None:
            self._user = own
        elif self._user != own:
            waiting = weakref.WeakMethod(self._wait_with_others)  # the driver must not keep a link that nobody has

            def is_to_read(connection: ClientConnection, deadline: Deadline) -> bool:
                wait = waiting()
                return wait is None or wait(connection, deadline)

            self._driver.is_to_read = is_to_read

    def _wait_with_others(self, connection: ClientConnection, deadline: Deadline) -> bool:
        """See `Scheduler.is_to_read`. Called with the lock; it is free while this waits.

        One thread at a time listens, and reads whatever comes; the others are told when it has.
        """
        remaining = deadline.remaining()
        seconds = LOOK_SECONDS if remaining is None else min(remaining, LOOK_SECONDS)
        if not self._is_listened and connection.has_news():
            return True
        self._waiting += 1
        try:
            if self._is_listened:
                self._changed.wait(seconds)
            else:
                self._listen(connection, seconds)
        finally:
            self._waiting -= 1
            if self._closed:
                self._changed.notify_all()  # whoever closes waits for the last of us to be done
        return False

    def _listen(self, connection: ClientConnection, seconds: float) -> None:
        """Wait without the lock until there is news."""
        self._changed.notify_all()  # what was read just now may have been another's
        self._is_listened, started = True, time.perf_counter()
        self._lock.release()
        try:
            connection.has_news(seconds)
        finally:
            self._lock.acquire()
            self._is_listened = False
            self.stats.seconds_waiting += time.perf_counter() - started


def _end(driver: Scheduler, owned: list[Callable[[], None]]) -> None:
    driver.farewell()
    for close in owned:
        close()
