"""A fleet of workers that act as one: the link that protected layers, masks and loading see.

    store     W*  ->  shards, placed by memory and speed  ->  uploads
    submit    X*  ->  a part for each shard  ->  the holder that should answer first
              no answer after the 99th percentile  ->  another holder too; the first answer counts
    a check refuses a product  ->  the enclave computes it, which names who was wrong: it is asked nothing any more

A member that fails, hangs or is slow again and again is left and named; what it alone held is sent to others from where
W* is kept, while work goes on. One that comes back is measured again and takes shards over.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from obfuscatune.enclave.client import MatrixSource, PendingProduct, RetryPolicy, WorkerLink, check_finite
from obfuscatune.enclave.client.requests import AdapterRequest, StoredMatrix, check_rows
from obfuscatune.enclave.fleet.asking import WAIT_SECONDS, Asking
from obfuscatune.enclave.fleet.holdings import Holdings
from obfuscatune.enclave.fleet.jobs import Job, Join, Part, Upload, now
from obfuscatune.enclave.fleet.keeper import Keeper, Probe
from obfuscatune.enclave.fleet.link import MemberLink, State
from obfuscatune.enclave.fleet.request import FleetProduct
from obfuscatune.enclave.fleet.shards import FleetMatrix
from obfuscatune.enclave.fleet.stats import FleetStats
from obfuscatune.errors import (
    BadReply,
    ConfigError,
    ConnectionLost,
    ProtectionError,
    QuotaExceeded,
    WireError,
    WrongProduct,
)
from obfuscatune.fleet.members import Member
from obfuscatune.fleet.placement import Plan, Shard
from obfuscatune.fleet.policy import key_of
from obfuscatune.process import begin_anew_in_children

OPENING_SECONDS = 5.0
"""How long the opening waits for members that do not answer."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
"""Seconds before a member that failed is tried again; doubled each time."""
SLOW_PAUSE = 30.0
"""Seconds before a member that was slow is tried again."""
CLOSING_SECONDS = 2.0
"""How long `close` waits for members to forget."""
WRONG_AT_MOST = 3
"""Members of one operator that may answer wrongly before no other of its members is taken in."""

Notice = Callable[[str], None]


class FleetClient(WorkerLink):
    """See the module. Safe from any thread, and in forked children."""

    corrects = True

    def __init__(
        self,
        members: Iterable[Member],
        connect: Callable[[Member], WorkerLink],
        probe: Probe,
        *,
        plan: Plan,
        notice: Notice,
        hedge: bool = True,
        patience_s: float = RetryPolicy.patience_s,
    ) -> None:
        """
        Args:
            members: of one party.
            connect: opens the link to a member, and fails soon where it cannot.
            probe: looks whether a member is alive; see `Keeper`.
            plan: how matrices are placed.
            notice: is told, in one line, what befalls members.
            hedge: whether slow requests are sent to another replica too.
            patience_s: how long a request waits while no member holds what it needs.
        """
        self._notice, self._connect, self._patience_s = notice, connect, patience_s
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._links: dict[str, MemberLink] = {}
        self._wrong: Counter[str] = Counter()
        """Members that answered wrongly, by key and by operator."""
        self._holdings = Holdings(self._links, plan, notice)
        self._asking = Asking(self._holdings, hedges=hedge, patience_s=patience_s, too_late=self._too_late)
        self._stats = FleetStats()
        self._products: weakref.WeakSet[FleetProduct] = weakref.WeakSet()
        self._verdict = ""
        self._closed = self._broken = False
        self._owned: list[Callable[[], None]] = []
        self._keeper = Keeper(self, probe)
        self._end = weakref.finalize(self, _end, self._links, self._keeper, self._owned)
        begin_anew_in_children(self)
        for member in members:
            self.add(member)

    def open(self) -> None:
        """Wait for the members; those that do not answer within `OPENING_SECONDS` are named, and tried again.

        Raises:
            WireError: none answers.
        """
        self._keeper.start()
        with self._changed:
            deadline = now() + OPENING_SECONDS
            while any(link.state is not State.ACTIVE for link in self._links.values()) and now() < deadline:
                self._changed.wait(max(0.0, deadline - now()))
            if not self._holdings.active:
                reasons = "; ".join(f"{link.title}: {link.reason or 'no answer'}" for link in self._links.values())
                raise ConnectionLost(f"no worker of the fleet answers: {reasons}")
            for link in self._links.values():
                if link.state is State.JOINING:
                    self._notice(f"{link.title} does not answer yet: going on without it")

    def add(self, member: Member) -> None:
        """Take in a member, unless it, or too many others of its operator, answered wrongly."""
        with self._lock:
            is_wrong = self._wrong[key_of(member) or member.address] or self._wrong[member.operator] >= WRONG_AT_MOST
            is_here = member.address in self._links or any(
                it.key is not None and it.key == key_of(member) for it in self._links.values()
            )
            if self._closed or is_wrong or is_here:
                return
            connect = self._connect
            link = MemberLink(member, lambda: connect(member), weakref.ref(self))
            self._links[member.address] = link
            link.put(Join())

    def remove(self, address: str) -> None:
        """Leave a member that is listed no more; what it held goes to others."""
        with self._lock:
            link = self._links.get(address)
            if link is not None and link.state is not State.OUT:
                link.state = State.OUT
                self._empty(link)
                del self._links[address]

    def update(self, listed: Iterable[Member], fixed: Container[str]) -> None:
        """Take in those that are listed now, and leave those that are not; but none of those at `fixed` addresses."""
        members = {member.address: member for member in listed}
        for link in self.links:
            if link.name not in fixed and members.get(link.name) != link.member:
                self.remove(link.name)
        for member in members.values():
            self.add(member)

    @property
    def links(self) -> list[MemberLink]:
        """Of all members, those away among them."""
        with self._lock:
            return list(self._links.values())

    @property
    def stats(self) -> FleetStats:
        """Totals over all members; the same object each time, brought up to date."""
        with self._lock:
            self._stats.count(link.worker.stats for link in self._links.values() if link.worker is not None)
            self._stats.reconnects += self._stats.lost  # masks that were drawn before are not used afterwards
            self._stats.workers = len(self._holdings.active)
            self._stats.moved, self._stats.hedged = self._holdings.moved, self._asking.hedged
            return self._stats

    @property
    def computes_apart(self) -> bool:
        """Whether any member computes on other cores than this process's."""
        return any(link.worker is not None and link.worker.computes_apart for link in self.links)

    def placement(self) -> list[Shard]:
        """Who holds what, or is being sent it."""
        with self._lock:
            return [shard.placed() for shard in self._holdings.shards]

    def store(
        self,
        matrix_id: bytes,
        source: MatrixSource,
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
        tensor: Tensor | None = None,
        widths: tuple[int, ...] = (),
    ) -> None:
        """Have the members hold W_star in shards; see `WorkerLink.store`.

        Raises:
            QuotaExceeded: they have no room for it.
            WireError: no member can be asked.
        """
        StoredMatrix(matrix_id, source, shape, dtype)  # for its checks
        matrix = FleetMatrix(matrix_id, source, shape, dtype, widths)
        self._keeper.start()
        with self._changed:
            self._wait_until(lambda: bool(self._holdings.active))
            uploads = self._holdings.place(matrix, tensor)
            self._wait_until(lambda: all(it.done.is_set() for it in uploads), patience_s=float("inf"))
            self._wait_until(lambda: self._is_settled(matrix))
        for upload in uploads:
            if upload.error is not None and not isinstance(upload.error, WireError):
                raise upload.error
        if not all(shard.holders for shard in matrix.shards):
            raise QuotaExceeded("no worker of the fleet has room for a matrix: add workers, or memory")

    def allocate(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """Memory of the enclave's own: no member can write to it."""
        return torch.empty(rows, cols, dtype=dtype)

    def submit(
        self,
        matrix_id: bytes,
        rows: Tensor,
        *,
        transpose: bool,
        reply_dtype: torch.dtype | None = None,
        known_finite: bool = False,
        product_unchecked: bool = False,
    ) -> FleetProduct:
        """Ask for a product, and return at once; see `WorkerLink.submit`. Members' answers are always looked at."""
        self._keeper.start()
        if not known_finite:
            check_finite(rows)
        with self._lock:
            self._check_open()
            matrix = self._holdings.matrices.get(matrix_id)
            if matrix is None:
                raise ConfigError("no matrix was stored under this id: store it first")
            check_rows(rows, matrix.shape[1 if transpose else 0])
            product = FleetProduct(self, matrix, rows.detach(), reply_dtype or rows.dtype, transpose=transpose)
            self._products.add(product)
            for part in product.undone:
                self._asking.ask(part)
            return product

    def order(self, order: AdapterRequest) -> Tensor | None:
        """A fleet holds no adapters: what must not be done twice has one worker.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a profile with LoRA on the worker (paper) takes one worker, no fleet: name it by --worker")

    def forget(self, matrix_id: bytes) -> None:
        """Have the members drop a matrix. One that was never stored is fine."""
        with self._lock:
            self._holdings.forget(matrix_id)

    @contextmanager
    def broken_off(self) -> Iterator[None]:
        """Within it, what waits for members in other threads fails soon."""
        with self._lock:
            self._broken = True
            self._wake()
        try:
            yield
        finally:
            self._broken = False

    def refusing(self) -> AbstractContextManager[None]:
        """Nothing: who was wrong is found by `corrected`, and the others are asked on."""
        return nullcontext()

    def own(self, close: Callable[[], None]) -> None:
        """Have `close` called once the fleet is closed."""
        self._owned.append(close)

    def close(self) -> None:
        """Have the members forget, and hang up; those that do not answer are left. Twice is once."""
        with self._lock:
            self._closed = True
            self._wake()
        self._end()

    def begin_in_child(self) -> None:
        """See `process.Forkable`: threads, and what was asked, are the parent's."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        for product in self._products:
            product.error = ConnectionLost("the process that this one was forked from asked for this: ask again")
            product.arrived = threading.Event()
        for link in self._links.values():
            link.begin_in_child()
        self._keeper.begin_in_child()

    # What products that are waited for ask.

    def attend(self, product: FleetProduct) -> float:
        """See `Attendant`."""
        with self._lock:
            if product.error is not None or not product.undone:
                return 0.0
            self._check_open()
            return self._asking.hedge(product)

    def corrected(self, product: PendingProduct, error: WireError) -> Tensor:
        """The product, computed in the enclave. Whoever sent a wrong part of it is named, and left for good.

        Raises:
            WrongProduct: no member is left.
        """
        if not isinstance(product, FleetProduct) or product.undone:
            raise error
        wrong = product.wrong_members()
        with self._lock:
            for link, excess in wrong:
                self._expel(link, f"its product is off by {excess:.3g} times what rounding explains")
            self._check_open()
        return product.computed()

    # What members tell, in their threads; see `link.Fleet`.

    def joined(self, link: MemberLink) -> None:
        """It is connected, and its speed is known."""
        with self._changed:
            if self._closed or link.state is State.OUT:
                return
            if link.state is State.AWAY:
                self._stats.returned += link.was_active
                self._notice(f"{link.title} is {'back' if link.was_active else 'there'}")
            link.state, link.was_active = State.ACTIVE, True
            link.pause, link.reason = 0.0, ""
            link.timing.forgiven()
            self._ask_all(self._holdings.rearranged(joining=[link.name]))
            self._changed.notify_all()

    def answered(self, link: MemberLink, part: Part, product: Tensor, seconds: float) -> None:
        """A product came, which is finite. That of a member that was wrong before is dropped."""
        with self._lock:
            if link.state is State.OUT:
                self._asking.ask_another(part, link, WrongProduct(link.reason))
                return
            self._asking.answered(link, part, seconds)
            if part.answer is None:
                part.answer, part.answered_by = product, link
                if not part.request.undone:
                    self._stats.crossings += 1
                part.request.arrived.set()

    def declined(self, link: MemberLink, part: Part, error: Exception) -> None:
        """It answered with an error, and can be asked other things."""
        with self._lock:
            part.refused_by.add(link)
            self._asking.ask_another(part, link, error)

    def uploaded(self, link: MemberLink, upload: Upload) -> None:
        """An upload is done, well or not."""
        with self._changed:
            self._ask_all(self._holdings.held(link, upload))
            upload.done.set()
            self._changed.notify_all()

    def failed(self, link: MemberLink, error: Exception, jobs: list[Job]) -> None:
        """It cannot be asked anything now."""
        with self._changed:
            if link.state is not State.OUT and not self._closed:
                if isinstance(error, BadReply | WrongProduct):
                    self._expel(link, str(error))
                elif link.state is not State.AWAY or link.retry_at == float("inf"):
                    self._leave(link, link.reason or str(error), FIRST_PAUSE)
            self._undone(link, error, jobs)
            self._changed.notify_all()

    def try_again(self, link: MemberLink) -> None:
        """Join a member that is away."""
        with self._lock:
            link.retry_at = float("inf")
            forget, link.to_forget = link.to_forget, []
            link.put(Join(forget))

    # All of the following under the lock.

    def _undone(self, link: MemberLink, error: Exception, jobs: list[Job]) -> None:
        """Have done otherwise what a member did not do."""
        for job in jobs:
            if isinstance(job, Part):
                self._asking.ask_another(job, link, error)
            elif isinstance(job, Upload):
                job.error = job.error or error
                job.done.set()
            elif isinstance(job, Join):
                link.to_forget += job.forget

    def _ask_all(self, parts: list[Part]) -> None:
        for part in parts:
            self._asking.ask(part)
            part.request.arrived.set()

    def _leave(self, link: MemberLink, reason: str, first_pause: float) -> None:
        """Leave a member for now."""
        was = link.state
        link.pause = min(max(LONGEST_PAUSE, first_pause), max(first_pause, 2 * link.pause))
        link.state, link.retry_at, link.reason = State.AWAY, now() + link.pause, reason
        if was is State.ACTIVE:
            self._notice(f"{link.title} is left for a while: {reason}")
            self._ask_all(self._holdings.without(link))
        elif was is State.JOINING:
            self._notice(f"{link.title} cannot be used: {reason}")
        if was is State.ACTIVE and first_pause == FIRST_PAUSE:
            self._stats.lost += 1

    def _too_late(self, link: MemberLink) -> None:
        self._stats.left_slow += 1
        self._leave(link, "it is slow again and again", SLOW_PAUSE)
        self._empty(link)

    def _expel(self, link: MemberLink, reason: str) -> None:
        """Leave a member for good, with all that it answered and nobody has used yet. The last one's error is ours."""
        if link.state is State.OUT:
            return
        link.state, link.reason = State.OUT, reason
        self._stats.left_wrong += 1
        self._wrong.update({link.key or link.name, link.member.operator})
        self._notice(f"{link.title} answered wrongly and is asked nothing any more: {reason}")
        for product in list(self._products):
            for part in product.doubtful(link):
                self._asking.ask(part)
        self._empty(link)
        link.close()
        if all(other.state is State.OUT for other in self._links.values()):
            self._verdict = (
                f"{link.title} answered wrongly: {reason}. No worker of the fleet is asked anything any more: find out "
                "why, then load or protect the model anew, which draws new secrets"
            )
            self._wake()

    def _empty(self, link: MemberLink) -> None:
        """Have others do what a member has not done, and hold what it holds."""
        jobs = link.take_jobs()
        self._ask_all(self._holdings.without(link))
        self._undone(link, ConnectionLost(f"{link.title} is left"), jobs)
        link.interrupt()

    def _wait_until(self, done: Callable[[], bool], patience_s: float | None = None) -> None:
        """Wait, at most for as long as the fleet is patient.

        Raises:
            ConnectionLost: it is not so by then.
        """
        deadline = now() + (self._patience_s if patience_s is None else patience_s)
        while not done():
            self._check_open()
            if now() > deadline:
                raise ConnectionLost(
                    f"no worker of the fleet could be sent a matrix for {self._patience_s:g} s: look at their messages"
                )
            self._changed.wait(WAIT_SECONDS)

    def _is_settled(self, matrix: FleetMatrix) -> bool:
        """Whether every shard has a holder, or nobody is going to be one."""
        without = [shard for shard in matrix.shards if not shard.holders]
        return not without or not (any(shard.coming for shard in without) or not self._holdings.active)

    def _check_open(self) -> None:
        if self._closed:
            raise ProtectionError(
                "this model's link to its fleet is closed, as close() and the end of a `with` leave it: "
                "load or protect the model again"
            )
        if self._verdict:
            raise WrongProduct(self._verdict)
        if self._broken:
            raise ConnectionLost("the link to the fleet was broken off on this side")

    def _wake(self) -> None:
        for product in list(self._products):
            product.arrived.set()
        self._changed.notify_all()


def _end(links: dict[str, MemberLink], keeper: Keeper, owned: list[Callable[[], None]]) -> None:
    keeper.stop()
    for link in links.values():
        link.close()
    deadline = now() + CLOSING_SECONDS
    for link in links.values():
        if not link.join(max(0.0, deadline - now())):
            link.interrupt()
    for close in owned:
        close()
