"""A fleet of workers that act as one: the link that protected layers, masks and loading see.

    store     W*  ->  shards, placed by memory and speed  ->  uploads
    submit    X*  ->  a part for each shard  ->  the holder that should answer first
              no answer after the 99th percentile  ->  another holder too; the first answer counts
    a check refuses a product  ->  the enclave computes it, which names who was wrong: it is asked nothing any more

A member that fails, hangs or is slow again and again is left and named; what it alone held is sent to others from where
W* is kept, while work goes on. One that comes back is measured again and takes shards over.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from obfuscatune.enclave.client import MatrixSource, PendingProduct, RetryPolicy, WorkerLink, check_finite
from obfuscatune.enclave.client.adapters import AdapterRequest
from obfuscatune.enclave.client.requests import StoredMatrix, check_rows
from obfuscatune.enclave.fleet.asking import WAIT_SECONDS
from obfuscatune.enclave.fleet.jobs import now
from obfuscatune.enclave.fleet.keeper import Keeper, Probe
from obfuscatune.enclave.fleet.link import MemberLink, State
from obfuscatune.enclave.fleet.request import FleetProduct
from obfuscatune.enclave.fleet.roster import Notice, Roster
from obfuscatune.enclave.fleet.shards import FleetMatrix
from obfuscatune.enclave.fleet.stats import FleetStats
from obfuscatune.errors import ConfigError, ConnectionLost, ProtectionError, QuotaExceeded, WireError, WrongProduct
from obfuscatune.fleet.members import Member
from obfuscatune.fleet.placement import Plan, Shard
from obfuscatune.process import begin_anew_in_children

OPENING_SECONDS = 5.0
"""How long the opening waits for members that do not answer."""
CLOSING_SECONDS = 2.0
"""How long `close` waits for members to forget."""


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
        self._patience_s = patience_s
        self._roster = Roster(connect, plan, notice, hedge=hedge, patience_s=patience_s)
        self._broken = False
        self._owned: list[Callable[[], None]] = []
        self._keeper = Keeper(self._roster, probe)
        self._end = weakref.finalize(self, _end, self._roster.links, self._keeper, self._owned)
        begin_anew_in_children(self)
        for member in members:
            self._roster.add(member)

    def open(self, wait_for: int = 1) -> None:
        """Wait for the members; those that do not answer within `OPENING_SECONDS` are named, and tried again.

        Args:
            wait_for: how many must be there; they are waited for as long as the fleet is patient.

        Raises:
            WireError: none answers, or not as many.
        """
        self._keeper.start()
        roster = self._roster
        with roster.changed:
            self._wait_at_most(
                OPENING_SECONDS, lambda: all(link.state is State.ACTIVE for link in roster.links.values())
            )
            if wait_for > 1:
                self._wait_at_most(self._patience_s, lambda: len(roster.holdings.active) >= wait_for)
            count, away = len(roster.holdings.active), [it for it in roster.present if it.state is not State.ACTIVE]
            if count < wait_for:
                few = f"{count} workers of the fleet answer, and {wait_for} are to be waited for (wait_for)"
                reasons = "; ".join(f"{link.title}: {link.reason or 'no answer'}" for link in away)
                raise ConnectionLost(f"{few if count else 'no worker of the fleet answers'}: {reasons or 'start more'}")
            for link in roster.present:
                if link.state is State.JOINING:
                    roster.notice(f"{link.title} does not answer yet: going on without it")

    def update(self, listed: Iterable[Member], fixed: Container[str]) -> None:
        """Take in members that are listed now, and leave those that are not; but none of those at `fixed` addresses."""
        self._roster.update(listed, fixed)

    @property
    def links(self) -> list[MemberLink]:
        """Of all members, those away among them."""
        return self._roster.present

    @property
    def stats(self) -> FleetStats:
        """Totals over all members; the same object each time, brought up to date."""
        roster, stats = self._roster, self._roster.stats
        with roster.lock:
            stats.count(link.worker.stats for link in roster.present if link.worker is not None)
            stats.reconnects += stats.lost  # masks that were drawn before are not used afterwards
            stats.workers = len(roster.holdings.active)
            stats.moved, stats.hedged = roster.holdings.moved, roster.asking.hedged
            return stats

    @property
    def computes_apart(self) -> bool:
        """Whether any member computes on other cores than this process's."""
        return any(link.worker is not None and link.worker.computes_apart for link in self._roster.present)

    def placement(self) -> list[Shard]:
        """Who holds what, or is being sent it."""
        with self._roster.lock:
            return [shard.placed() for shard in self._roster.holdings.shards]

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
        with self._roster.changed:
            self._wait_until(lambda: bool(self._roster.holdings.active))
            uploads = self._roster.holdings.place(matrix, tensor)
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
        with self._roster.lock:
            self._check_open()
            matrix = self._roster.holdings.matrices.get(matrix_id)
            if matrix is None:
                raise ConfigError("no matrix was stored under this id: store it first")
            check_rows(rows, matrix.shape[1 if transpose else 0])
            product = FleetProduct(self, matrix, rows.detach(), reply_dtype or rows.dtype, transpose=transpose)
            self._roster.products.add(product)
            for part in product.undone:
                self._roster.asking.ask(part)
            return product

    def order(self, order: AdapterRequest) -> Tensor | None:
        """A fleet holds no adapters: what must not be done twice has one worker.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a profile with LoRA on the worker (paper) takes one worker, no fleet: name it by --worker")

    def forget(self, matrix_id: bytes) -> None:
        """Have the members drop a matrix. One that was never stored is fine."""
        with self._roster.lock:
            self._roster.holdings.forget(matrix_id)

    @contextmanager
    def broken_off(self) -> Iterator[None]:
        """Within it, what waits for members in other threads fails soon."""
        with self._roster.lock:
            self._broken = True
            self._roster.wake()
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
        with self._roster.lock:
            self._roster.closed = True
            self._roster.wake()
        self._end()

    def begin_in_child(self) -> None:
        """See `process.Forkable`: threads, and what was asked, are the parent's."""
        self._roster.begin_in_child()
        self._keeper.begin_in_child()

    # What products that are waited for ask.

    def attend(self, product: FleetProduct) -> float:
        """See `Attendant`."""
        with self._roster.lock:
            if product.error is not None or not product.undone:
                return 0.0
            self._check_open()
            return self._roster.asking.hedge(product)

    def corrected(self, product: PendingProduct, error: WireError, renew: Callable[[Tensor], None] | None) -> Tensor:
        """The product, computed in the enclave. Whoever sent a wrong part of it is named, and left for good.

        The secret vectors are drawn anew: a fleet has no more guesses at them than one worker has.

        Raises:
            WrongProduct: no member is left.
        """
        if not isinstance(product, FleetProduct) or product.undone:
            raise error
        W_star = product.matrix.elements()
        wrong = product.wrong_members(W_star)
        if renew is not None:
            renew(W_star)
        with self._roster.lock:
            for link, excess in wrong:
                self._roster.expel(link, f"its product is off by {excess:.3g} times what rounding explains")
            self._check_open()
        return product.computed(W_star)

    def _wait_at_most(self, seconds: float, done: Callable[[], bool]) -> None:
        deadline = now() + seconds
        while not done() and now() < deadline:
            self._roster.changed.wait(max(0.0, deadline - now()))

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
            self._roster.changed.wait(WAIT_SECONDS)

    def _is_settled(self, matrix: FleetMatrix) -> bool:
        """Whether every shard has a holder, or nobody is going to be one."""
        without = [shard for shard in matrix.shards if not shard.holders]
        return not without or not (any(shard.coming for shard in without) or not self._roster.holdings.active)

    def _check_open(self) -> None:
        if self._roster.closed:
            raise ProtectionError(
                "this model's link to its fleet is closed, as close() and the end of a `with` leave it: "
                "load or protect the model again"
            )
        if self._roster.failure is not None:
            raise ProtectionError(
                "the fleet failed in the enclave itself, which is not a worker's doing: please report it, and load or "
                "protect the model again"
            ) from self._roster.failure
        if self._roster.verdict:
            raise WrongProduct(self._roster.verdict)
        if self._broken:
            raise ConnectionLost("the link to the fleet was broken off on this side")


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
