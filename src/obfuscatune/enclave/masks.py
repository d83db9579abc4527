"""One-time masks: to the compute worker, rows under a mask are noise.

    ahead of time   r (m, p), fresh          ->  mask worker: r W*, verified, kept until it is used, once
    request         X' = round(X*) + r       ->  compute worker: X' W*
    reply           Y* = X' W* - r W*

**Numbers.** X* is rounded to multiples of the grid u = 2^-22. r is normal with the standard deviation L = 2^28, rounded
down to multiples of the same. Both are float64, whose integers are exact up to 2^53 units: X' is their exact sum. Where
a mask is larger than that, once in 10^15 elements, the sum is rounded, which is a function of the sum and shows nothing
of X*. What the products lose is L 2^-53 per element, as much as float32 loses without masks.

**Once.** A mask hides one set of rows: `hide` empties it, and then overwrites r. A mask that was drawn ahead belongs to
this process, to this boot of the machine, and to the connection to the compute worker that it was drawn under. In a
forked child, in a process that is restored from a checkpoint on another boot, and after a reconnection, masks that were
drawn before are dropped. docs/guarded.md says what that leaves open.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from obfuscatune.enclave import kernels
from obfuscatune.enclave.accountant import Accountant
from obfuscatune.enclave.client import PendingProduct, WorkerLink
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.mixing import FewMixing, Mixing
from obfuscatune.enclave.verification import Check, Verifier
from obfuscatune.errors import BadReply, NonFiniteError, ProtectionError, WireError, WrongProduct
from obfuscatune.machine import cores
from obfuscatune.native import compute_on
from obfuscatune.process import begin_anew_in_children

GRID = 2.0**-22
"""u: masked rows are multiples of it."""
DEVIATION = 2.0**28
"""L: standard deviation of a mask's elements, beside which those of a scaled row are about 1."""
DEFAULT_MEMORY_BYTES = 1 << 30
"""Of masks that are drawn ahead, with their products."""
AHEAD = 2
"""Masks of one shape for one matrix that are ready or being drawn; of few rows, as many as are drawn together."""
ROWS_TOGETHER = 72
"""Of masks that are drawn ahead by one request: those of eight decoding steps cost little more than one's."""
STALE_SECONDS = 30.0
"""Masks of a shape that was not asked for during so long give way to others."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BOOT_ID_BYTES = 37
"""A UUID and a line feed."""


def draw(stream: SecretStream, rows: int, width: int, deviation: float = DEVIATION) -> Tensor:
    """r (rows, width), float64: normal numbers of that standard deviation, rounded down to `GRID`."""
    return stream.grid_normal(rows, width, deviation=deviation, grid=GRID)


class MaskRequest:
    """A request to the mask worker for r W*, of one mask or of several that lie one below the other."""

    def __init__(
        self, request: PendingProduct, check: Check, renew: Callable[[Tensor], None], client: WorkerLink
    ) -> None:
        """
        Args:
            request: for r W*.
            check: holds the product against secret vectors.
            renew: see `WorkerLink.corrected`.
            client: the mask worker's.
        """
        self._request: PendingProduct | None = request
        self._check, self._renew, self._client = check, renew, client
        self._product = torch.empty(0, dtype=torch.float64)

    def product(self) -> Tensor:
        """R W*, waited for, copied out of the mask worker's reach and verified there, once.

        Raises:
            WrongProduct: it is not the product. The mask worker is asked nothing any more.
            WireError: see `WorkerClient.multiply`.
        """
        request, self._request = self._request, None
        if request is not None:
            try:
                self._product = self._checked(request, request.result())
            except (BadReply, WrongProduct) as error:
                corrected = self._client.corrected(request, error, self._renew)
                self._product = self._checked(request, corrected)
            finally:
                request.rows.zero_()  # our own copy of r, or the mask worker's
        return self._product

    def _checked(self, request: PendingProduct, product: Tensor) -> Tensor:
        with self._client.refusing():
            product = request.own(product)
            self._check(product)
        return product


class Mask:
    """r (m, p) and, once the mask worker has answered, r W* (m, q). Hides one set of rows, and no other."""

    def __init__(self, r: Tensor, request: MaskRequest, first_row: int = 0) -> None:
        """A mask whose product was asked for.

        Args:
            r: float64, multiples of `GRID`; this object's own from here on.
            request: for r W*, among others.
            first_row: of r among the rows of the request.
        """
        self._r: Tensor | None = r
        self._request: MaskRequest | None = request
        self._rows = slice(first_row, first_row + len(r))

    def settle(self) -> None:
        """Wait for the product; see `MaskRequest.product`."""
        if self._request is not None:
            self._request.product()

    def hide(self, X_star: Tensor, out: Tensor) -> Tensor:
        """round(X*) + r in `out` (m, p), float64, for X* (m, p) float64 or float32; then r is overwritten.

        Raises:
            ProtectionError: this mask has hidden rows before.
            NonFiniteError: X* contains NaN or infinity.
        """
        r, self._r = self._r, None
        if r is None:
            raise ProtectionError("this mask has hidden rows before, and hides no others")
        finite = kernels.mask_rows(X_star, r, GRID, out)
        r.zero_()
        if not finite:
            out.zero_()
            raise NonFiniteError("rows to be masked contain NaN or infinity; they were not sent")
        return out

    def reveal(self, Y_masked: Tensor, dtype: torch.dtype, *, again: bool = False) -> Tensor:
        """X* W* (m, q) in `dtype`, in memory of its own, for X' W* (m, q), float64; then r W* is overwritten.

        X' W* is read once, and may lie where the compute worker can write to it. With `again`, r W* is kept for another
        X' W* of the same rows, should this one prove wrong.

        Raises:
            ProtectionError: no rows were hidden, or their product has been revealed before.
            WireError: see `MaskRequest.product`.
        """
        request = self._request
        if request is None or self._r is not None:
            raise ProtectionError("this mask hides no product, or has revealed it before")
        product = request.product()[self._rows]
        if again:
            product = product.clone()
        else:
            self._request = None
        Y_star = torch.empty(product.shape, dtype=dtype)
        kernels.unmask_rows(Y_masked, product, Y_star)
        return Y_star

    def __repr__(self) -> str:
        return "Mask(<redacted>)"


class MaskKey(NamedTuple):
    """What masks fit: those of one key can stand for each other."""

    matrix_id: bytes
    """Of the matrix, as the mask worker has it."""
    rows: int
    transpose: bool


@dataclass(frozen=True)
class Masked:
    """One matrix as the mask worker holds it, and what verifies its products."""

    matrix_id: bytes
    shape: tuple[int, int]
    verifier: Verifier

    def nbytes(self, key: MaskKey) -> int:
        """Of one mask for it, and its product."""
        return 8 * key.rows * sum(self.shape)


@dataclass
class MaskStats:
    """Totals of the masks of one model."""

    ahead: int = 0
    """Masks that were ready when rows came."""
    awaited: int = 0
    """Masks that were drawn when rows came, because none was ready."""
    dropped: int = 0
    """Masks that were drawn ahead and may not be used any more."""
    seconds_waiting: float = 0.0
    """Time that rows waited for a mask, or products for the mask's product."""


@dataclass
class _Store:
    """Masks that are ready, by what they fit."""

    ready: dict[MaskKey, deque[Mask]] = field(default_factory=lambda: defaultdict(deque))
    asked: OrderedDict[MaskKey, tuple[Masked, float]] = field(default_factory=OrderedDict)
    """When a mask was last taken, and for which matrix; the oldest first."""
    nbytes: int = 0
    drawing: Counter[MaskKey] = field(default_factory=Counter)
    """Masks that were asked for and are not ready."""

    def take(self, key: MaskKey, masked: Masked) -> Mask | None:
        self.asked[key] = masked, time.monotonic()
        self.asked.move_to_end(key)
        masks = self.ready.get(key)
        if not masks:
            return None
        self.nbytes -= masked.nbytes(key)
        return masks.popleft()

    def wanted(self, key: MaskKey, masked: Masked, memory_bytes: int) -> int:
        """How many more are to be drawn by one request; these count as being drawn from here on.

        Each kind has an equal share of the memory, where that is too small for all. Of a kind there are up to three
        requests' masks: those that are drawn, those that are ready, and those used, in whose memory others still lie.
        """
        share = memory_bytes // len(self.asked) // masked.nbytes(key) if self.asked else 0
        together = max(1, min(ROWS_TOGETHER // key.rows, share // 3))
        if self.drawing[key] + len(self.ready.get(key, ())) >= max(AHEAD, together):
            return 0
        self.drawing[key] += together
        return together

    def put(self, key: MaskKey, masked: Masked, masks: list[Mask]) -> None:
        self.asked.setdefault(key, (masked, time.monotonic()))  # it may have gone stale meanwhile, and must not stay
        self.ready[key].extend(masks)
        self.nbytes += len(masks) * masked.nbytes(key)

    def make_room(self, nbytes: int, memory_bytes: int) -> bool:
        """Drop masks of shapes that are not asked for any more; whether `nbytes` more have room."""
        stale = time.monotonic() - STALE_SECONDS
        while self.nbytes + nbytes > memory_bytes and self.asked:
            key, (masked, asked_at) = next(iter(self.asked.items()))
            if asked_at > stale:
                break
            del self.asked[key]
            self.nbytes -= len(self.ready.pop(key, ())) * masked.nbytes(key)
        return self.nbytes + nbytes <= memory_bytes

    def __len__(self) -> int:
        return sum(len(masks) for masks in self.ready.values())


class Masks:
    """Draws the masks of one model, ahead of time where memory allows. Safe from any thread.

    Each mask that is taken has another of its shape drawn by a thread of our own: what comes once mostly comes again.
    """

    def __init__(
        self,
        client: WorkerLink,
        accountant: Accountant,
        *,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        connection: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Args:
            client: the mask worker's.
            accountant: counts what is sent under the masks.
            memory_bytes: of masks that are drawn ahead; 0 has none drawn ahead.
            connection: something that changes when the compute worker is connected anew.
        """
        self.client, self.accountant, self.stats = client, accountant, MaskStats()
        self._memory_bytes, self._connection, self._stocked = memory_bytes, connection, False
        self._stream = SecretStream.fresh()
        self._lock, self._drawing = threading.Lock(), threading.Lock()
        self._begin()
        begin_anew_in_children(self)

    def _begin(self) -> None:
        self._store, self._origin = _Store(), self._present()
        self._wanted: queue.SimpleQueue[tuple[MaskKey, Masked, int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._end = weakref.finalize(self, self._wanted.put, None)

    def begin_in_child(self) -> None:
        """See `process.Forkable`: what the parent drew is the parent's."""
        self._end.detach()
        self._lock, self._drawing = threading.Lock(), threading.Lock()
        self._begin()

    def take(self, masked: Masked, rows: int, *, transpose: bool) -> Mask:
        """A mask for `rows` rows; its product may still be on its way.

        Raises:
            WireError: the mask worker failed.
        """
        key = MaskKey(masked.matrix_id, rows, transpose)
        with self._lock:
            self._drop_what_is_not_ours()
            mask = self._store.take(key, masked)
            self.stats.ahead += mask is not None
            self.stats.awaited += mask is None
        if mask is None:
            started = time.perf_counter()
            (mask,) = self._drawn(key, masked, 1)
            self.stats.seconds_waiting += time.perf_counter() - started
        if self._memory_bytes and not self._stocked:
            self._ask_for_another(key, masked)
        return mask

    @contextlib.contextmanager
    def stocked(self, each: int) -> Iterator[None]:
        """Draw until `each` masks are ready of every kind that was asked for lately; none while the `with` lasts.

        Then nothing but what must be computed at once takes the machine's time. No more are drawn than memory allows.

        Raises:
            WireError: the mask worker failed.
        """
        self._stocked = True
        try:
            with self._drawing, self._lock:  # once the thread has finished the one that it is drawing
                self._drop_what_is_not_ours()
                missing = [
                    (key, masked, each - len(self._store.ready.get(key, ())))
                    for key, (masked, _) in self._store.asked.items()
                ]
            for key, masked, count in missing:
                together = max(1, ROWS_TOGETHER // key.rows)
                for start in range(0, count, together):
                    self._keep(key, masked, min(together, count - start))
            yield
        finally:
            self._stocked = False

    def reveal(self, mask: Mask, Y_masked: Tensor, dtype: torch.dtype, *, again: bool = False) -> Tensor:
        """See `Mask.reveal`; what it waits for the mask worker is counted."""
        started = time.perf_counter()
        mask.settle()
        self.stats.seconds_waiting += time.perf_counter() - started
        return mask.reveal(Y_masked, dtype, again=again)

    def account(self) -> dict[str, Any]:
        """What was sent under masks, and the most that the compute worker can have learned: for run.json and reports.

        Keys: `rows`; `mu` and `advantage` of all that was sent; `budget`, the largest advantage allowed; `mu_by_layer`;
        and the `MaskStats`.
        """
        spent = self.accountant.spent
        account = {"rows": spent.rows, "mu": spent.mu, "advantage": spent.advantage, "budget": self.accountant.budget}
        return {**account, "mu_by_layer": spent.by_layer, **asdict(self.stats)}

    def forget(self, matrix_id: bytes) -> None:
        """Have the mask worker drop a matrix; masks that are ready for it are dropped when their shape is stale."""
        self.client.forget(matrix_id)

    def close(self) -> None:
        """Draw no more, let the mask worker forget, and close its connection."""
        self._end()
        self.client.close()

    def _drawn(self, key: MaskKey, masked: Masked, count: int) -> list[Mask]:
        """Fresh masks, whose products the mask worker was asked for in one request."""
        width = masked.shape[1] if key.transpose else masked.shape[0]
        r = draw(self._stream, count * key.rows, width, self.accountant.deviation)
        sent = self.client.allocate(count * key.rows, width, torch.float64).copy_(r)
        request = self.client.submit(
            key.matrix_id, sent, transpose=key.transpose, known_finite=True, product_unchecked=True
        )
        check = masked.verifier.check_for(
            lambda v: kernels.project(r, v).images,
            self.accountant.deviation,
            torch.float64,
            transpose=key.transpose,
            party="mask worker",
        )
        asked = MaskRequest(request, check, masked.verifier.renew, self.client)
        return [Mask(of_one, asked, first_row=index * key.rows) for index, of_one in enumerate(r.split(key.rows))]

    def _drop_what_is_not_ours(self) -> None:
        present = self._present()
        if present != self._origin:
            self.stats.dropped += len(self._store)
            self._store, self._origin = _Store(), present

    def _present(self) -> tuple[object, ...]:
        """What a mask is bound to."""
        return os.getpid(), _boot_id(), self._connection()

    def _ask_for_another(self, key: MaskKey, masked: Masked) -> None:
        with self._lock:
            count = self._store.wanted(key, masked, self._memory_bytes)
            if not count:
                return
            self._wanted.put((key, masked, count))
            if self._thread is None:
                reference = weakref.ref(self)
                self._thread = threading.Thread(
                    target=_draw_ahead, args=(reference, self._wanted), name="masks", daemon=True
                )
                self._thread.start()

    def draw_ahead(self, key: MaskKey, masked: Masked, count: int = 1) -> None:
        """Draw masks that were asked for, unless enough are `stocked`; see `_keep`."""
        with self._lock:
            self._drop_what_is_not_ours()
            self._store.drawing[key] = max(0, self._store.drawing[key] - count)
        with self._drawing:
            if not self._stocked:
                self._keep(key, masked, count)

    def _keep(self, key: MaskKey, masked: Masked, count: int) -> None:
        """Draw masks by one request and keep them, where there is room for them.

        Raises:
            WireError: the mask worker failed.
        """
        nbytes = count * masked.nbytes(key)
        with self._lock:
            self._drop_what_is_not_ours()
            origin, store = self._origin, self._store
            if not store.make_room(nbytes, self._memory_bytes):
                return
        drawn = self._drawn(key, masked, count)
        drawn[0].settle()
        with self._lock:
            if origin == self._origin == self._present():
                store.put(key, masked, drawn)


@dataclass(frozen=True)
class LayerMasks:
    """The masks of a model, as one layer takes them."""

    masks: Masks
    layer: str

    @property
    def deviation(self) -> float:
        """Of a mask's elements."""
        return self.masks.accountant.deviation

    def take(self, masked: Masked | None, n: int, mixing: Mixing | FewMixing, *, transpose: bool) -> Mask:
        """A mask for a request of n rows, which were scaled, once it is accounted for.

        Raises:
            BudgetExceeded: the request must not be sent.
            ProtectionError: a row is larger than the account has it.
            WireError: the mask worker failed.
        """
        if masked is None:
            raise ProtectionError(f"the mask worker does not hold the matrix of {self.layer}")
        if not mixing.mean_square <= 1:
            raise ProtectionError(f"rows of {self.layer} are too large to be scaled, and so to be hidden under a mask")
        self.masks.accountant.spend(self.layer, n, masked.shape[1 if transpose else 0])
        return self.masks.take(masked, mixing.rows, transpose=transpose)


def _draw_ahead(reference: weakref.ref[Masks], wanted: queue.SimpleQueue[tuple[MaskKey, Masked, int] | None]) -> None:
    """The thread: it keeps neither the masks nor their model alive while it waits.

    It leaves half of the cores to what cannot wait.
    """
    compute_on(max(1, cores() // 2))
    while (item := wanted.get()) is not None:
        masks = reference()
        if masks is None:
            return
        with contextlib.suppress(WireError, ProtectionError):  # whoever needs a mask meets the same, and can say so
            masks.draw_ahead(*item)
        del masks, item


@functools.cache
def _boot_id_file() -> int | None:
    """A descriptor that stays open, in forked children too; None where the system has no such file.

    The kernel answers every read anew. A read takes 3 us, opening the file for each mask 80 us with it.
    """
    try:
        return os.open(_BOOT_ID, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _boot_id() -> bytes:
    """Of this boot of the machine; nothing where the system has none."""
    for _ in range(2):
        file = _boot_id_file()
        if file is None:
            break
        with contextlib.suppress(OSError):
            read = os.pread(file, _BOOT_ID_BYTES + 1, 0)
            if len(read) == _BOOT_ID_BYTES:
                return read
        _boot_id_file.cache_clear()  # somebody closed the descriptor, and may have opened another file as that number
    return b""
