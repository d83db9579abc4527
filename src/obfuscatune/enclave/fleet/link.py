"""One member of a fleet: its link, the thread that drives it, and how it does.

    jobs  ->  one thread: up to `IN_FLIGHT` products asked for at a time, everything else alone  ->  the fleet is told

The thread keeps neither the fleet nor its model alive. Nothing waits for it without a bound: who waits for a product
asks another member meanwhile, and a thread that is stuck with a dead worker is woken by `interrupt`.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum
from typing import NamedTuple, Protocol

import torch

from obfuscatune.enclave.client import PendingProduct, WorkerLink
from obfuscatune.enclave.fleet.jobs import Forget, Job, Join, Part, Upload, now
from obfuscatune.enclave.fleet.timing import Timing
from obfuscatune.errors import LimitExceeded, WireError, WorkerRefused, WrongProduct
from obfuscatune.fleet.members import Member
from obfuscatune.fleet.placement import Seat
from obfuscatune.fleet.policy import key_of

IN_FLIGHT = 8
"""Products that a member is asked for at a time."""
CALIBRATION = 256
"""Rows and columns of the product that measures a member's speed."""
CALIBRATIONS = 5
"""Such products; the fastest counts."""


class State(Enum):
    """What a member can be asked."""

    JOINING = "joining"
    """It was never connected, or is being connected anew."""
    ACTIVE = "active"
    AWAY = "away"
    """It failed or was too slow; it is tried again."""
    OUT = "out"
    """It answered wrongly: it is asked nothing any more."""


class Fleet(Protocol):
    """What a member tells of. Called in the member's thread."""

    def joined(self, link: MemberLink) -> None:
        """It is connected, and its speed is known."""

    def answered(self, link: MemberLink, part: Part, product: torch.Tensor, seconds: float) -> None:
        """A product came, which is finite, `seconds` after it was asked for and the one before it came."""

    def refused(self, link: MemberLink, part: Part, error: Exception) -> None:
        """It answered with an error, and can be asked other things."""

    def uploaded(self, link: MemberLink, upload: Upload) -> None:
        """An upload is done, well or with `upload.error`."""

    def failed(self, link: MemberLink, error: Exception, jobs: list[Job]) -> None:
        """It cannot be asked anything now; `jobs` were not done."""

    def broke(self, error: BaseException) -> None:
        """The thread ends, by a failure of our own."""


class _Flight(NamedTuple):
    """A part that was asked for."""

    part: Part
    pending: PendingProduct
    started: float
    seconds: float
    """That it should take."""


class MemberLink:
    """A member as the fleet client sees it. `state` and what follows belong to the fleet, under the fleet's lock."""

    def __init__(self, member: Member, connect: Callable[[], WorkerLink], fleet: Callable[[], Fleet | None]) -> None:
        """Nothing is connected before a `Join`.

        Args:
            connect: opens the link.
            fleet: who is told; None once it is gone.
        """
        self.member, self.name, self.key = member, member.address, key_of(member)
        self._connect, self._fleet = connect, fleet
        self.state = State.JOINING
        self.reason = ""
        """Why it is left, where that is not what the thread met."""
        self.retry_at, self.pause = math.inf, 0.0
        """When it is joined again, if it is away and not being joined; and after which pause."""
        self.was_active, self.active_since = False, 0.0
        self.to_forget: list[bytes] = []
        """Shards that it held when it was left."""
        self.full_at: int | None = None
        """Bytes beyond which it refused more."""
        self.timing = Timing()
        self.worker: WorkerLink | None = None
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._jobs: deque[tuple[Job, float]] = deque()
        """And how many seconds each should take."""
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._breaking: ExitStack | None = None
        self.busy_since: float | None = None
        """When it was last heard of, or first asked; None while there is nothing to answer."""
        self.load = 0.0
        """Seconds that what is to be done, and not done yet, should take."""
        self._answered_at = 0.0

    def begin_in_child(self) -> None:
        """In a forked child: the thread is the parent's. The link begins anew by itself."""
        self._begin()

    @property
    def title(self) -> str:
        """How notices call it."""
        return f"the {self.member.party} worker {self.name} (operator {self.member.operator})"

    def seat(self) -> Seat:
        """As placement sees it."""
        bounds = [it for it in (self.member.memory, self.full_at) if it is not None]
        return Seat(self.name, min(bounds, default=None), self.timing.speed)

    def put(self, job: Job, seconds: float = 0.0) -> None:
        """Have a job done, after those before it.

        Args:
            seconds: that it should take.
        """
        with self._news:
            if self._closed:
                return
            self._jobs.append((job, seconds))
            self.load += seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"fleet {self.name}", daemon=True)
                self._thread.start()
            self._news.notify()

    def interrupt(self) -> None:
        """Have what is under way fail: the thread is woken where it waits for the worker."""
        worker = self.worker
        with self._news:
            if worker is None or self._breaking is not None or self.busy_since is None:
                return
            self._breaking = ExitStack()
            self._breaking.enter_context(worker.broken_off())

    def take_jobs(self) -> list[Job]:
        """What is not begun, which it does not do then."""
        with self._news:
            jobs = [job for job, _ in self._jobs]
            self.load -= sum(seconds for _, seconds in self._jobs)
            self._jobs.clear()
            return jobs

    def close(self) -> None:
        """Have the worker forget, hang up, and end the thread; see `join`."""
        with self._news:
            self._closed = True
            self._jobs.clear()
            self._news.notify()

    def join(self, seconds: float) -> bool:
        """Whether the thread has ended within that time."""
        thread = self._thread
        if thread is None:
            if self.worker is not None:
                self.worker.close()
            return True
        thread.join(seconds)
        return not thread.is_alive()

    def _run(self) -> None:
        flying: deque[_Flight] = deque()
        while True:
            with self._news:
                while not (self._jobs or flying or self._closed):
                    self.busy_since, self.load = None, 0.0
                    self._news.wait()
                if self._closed and not flying:
                    break
                job, seconds = self._jobs.popleft() if self._jobs and len(flying) < IN_FLIGHT else (None, 0.0)
                self.busy_since = self.busy_since or now()
            try:
                self._step(job, seconds, flying)
            except BaseException as error:
                if (fleet := self._fleet()) is not None:
                    fleet.broke(error)
                raise
        self.busy_since = now()
        if self.worker is not None:
            with contextlib.suppress(WireError):
                self.worker.close()

    def _step(self, job: Job | None, seconds: float, flying: deque[_Flight]) -> None:
        try:
            if job is None:
                self._settle(flying)
            elif isinstance(job, Part) and job.answer is None:
                flying.append(_Flight(job, self._submit(job), now(), seconds))
            else:
                if not isinstance(job, Part):
                    while flying:
                        self._settle(flying)
                    self._do(job)
                self._unload(seconds)
            self.busy_since = now()
        except Exception as error:  # noqa: BLE001  nobody would hear of it in this thread: who waits does
            self._fail(error, job, flying)

    def _submit(self, part: Part) -> PendingProduct:
        return self._connected().submit(
            part.shard.shard_id, part.rows, transpose=part.transpose, reply_dtype=part.dtype, known_finite=True
        )

    def _settle(self, flying: deque[_Flight]) -> None:
        flight, fleet = flying[0], self._fleet()
        try:
            product = flight.pending.own(flight.pending.result())
        except (WorkerRefused, LimitExceeded) as error:
            flying.popleft()
            self._unload(flight.seconds)
            if fleet is not None:
                fleet.refused(self, flight.part, error)
            return
        flying.popleft()
        self._unload(flight.seconds)
        before, self._answered_at = max(flight.started, self._answered_at), now()
        if fleet is not None:
            fleet.answered(self, flight.part, product, self._answered_at - before)

    def _unload(self, seconds: float) -> None:
        with self._news:
            self.load -= seconds

    def _do(self, job: Upload | Forget | Join) -> None:
        worker, fleet = self._connected(), self._fleet()
        if isinstance(job, Forget):
            worker.forget(job.shard_id)
        elif isinstance(job, Join):
            for shard_id in job.forget:
                worker.forget(shard_id)
            self.timing.calibrated(*_calibrate(worker))
            if fleet is not None:
                fleet.joined(self)
        else:
            self._upload(worker, job)
            if fleet is not None:
                fleet.uploaded(self, job)

    def _upload(self, worker: WorkerLink, upload: Upload) -> None:
        shard, matrix = upload.shard, upload.shard.matrix
        try:
            elements = shard.elements() if upload.elements is None else upload.elements
        except Exception as error:  # noqa: BLE001  the enclave's own failure, which no member is to be left for
            upload.error = error
            return
        try:
            worker.store(
                shard.shard_id,
                shard.elements,
                shape=(shard.rows, shard.columns),
                dtype=matrix.dtype,
                tensor=elements,
                widths=matrix.widths if matrix.whole(shard) else (),
            )
        except (WorkerRefused, LimitExceeded) as error:
            upload.error = error
        finally:
            upload.elements = None

    def _connected(self) -> WorkerLink:
        if self.worker is None:
            self.worker = self._connect()
        return self.worker

    def _fail(self, error: Exception, job: Job | None, flying: deque[_Flight]) -> None:
        with self._news:
            jobs = [it.part for it in flying] + ([] if job is None else [job]) + [it for it, _ in self._jobs]
            flying.clear()
            self._jobs.clear()
            self.busy_since, self.load = None, 0.0
            if self._breaking is not None:
                self._breaking.close()
                self._breaking = None
        if (fleet := self._fleet()) is not None:
            fleet.failed(self, error, jobs)


def _calibrate(worker: WorkerLink) -> tuple[int, float]:
    """Multiplications, and the shortest time for them; nothing of the model's is sent.

    Raises:
        WrongProduct: what came is not the product.
        WireError: the worker failed.
    """
    matrix_id, shortest = secrets.token_bytes(16), float("inf")
    generator = torch.Generator().manual_seed(int.from_bytes(secrets.token_bytes(7)))
    W = torch.randn(CALIBRATION, CALIBRATION, generator=generator)
    worker.store(matrix_id, W.clone, shape=(CALIBRATION, CALIBRATION), dtype=W.dtype, tensor=W.clone())
    for _ in range(CALIBRATIONS):
        started = now()
        rows = worker.allocate(CALIBRATION, CALIBRATION, W.dtype).copy_(W)
        product = worker.multiply(matrix_id, rows, transpose=False)
        shortest = min(shortest, now() - started)
    worker.forget(matrix_id)
    if not torch.allclose(product, W @ W, rtol=0, atol=2.0):
        raise WrongProduct("the product that measures its speed is wrong")
    return CALIBRATION**3, shortest
