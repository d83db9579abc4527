"""A device of this machine as a worker: no second process, the boundary is the bus.

    store      W*      ->  the device's memory, where it stays
    submit     rows    ->  registered memory  ->  the device, while the last product is computed   (backend/)
    result     product <-  registered memory  <-  the device

The device is not trusted: what lies in registered memory it may read and change at any time, and its products are
verified as a worker process's are. docs/adr/0026 says what that protects from, and what it cannot.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from obfuscatune.backend import Computer, HostMemory, Underway, find_device
from obfuscatune.enclave.client.adapters import AdapterRequest
from obfuscatune.enclave.client.allocator import Allocator
from obfuscatune.enclave.client.interface import WorkerLink
from obfuscatune.enclave.client.recording import BusRecorder
from obfuscatune.enclave.client.requests import (
    MatrixSource,
    ProductRequest,
    StoredMatrix,
    check_finite,
    check_product,
)
from obfuscatune.enclave.client.retry import ClientStats, Refusal, Refusing
from obfuscatune.errors import (
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    ProtectionError,
    QuotaExceeded,
    WireError,
)
from obfuscatune.machine import memory_bytes as memory_of_this_machine
from obfuscatune.process import begin_anew_in_children
from obfuscatune.protocol.addresses import DeviceAddress
from obfuscatune.protocol.limits import MIB, SHARED_BYTES

SHARE_OF_MEMORY = 0.8
"""Of this machine's memory, that matrices on `device:cpu` may take, as those of a worker process."""
CLOSING_SECONDS = 5.0
"""How long `close` waits for what the device still copies."""
_abandoned: list[tuple[list[Underway], HostMemory]] = []  # a device that hung may still write there: never freed
NOT_IN_A_CHILD = (
    "this link belongs to the process that opened it: a forked child can use no CUDA device, and no transcript but its "
    "own. Open one in the child (started by spawn), or run `obfuscatune worker --device cuda` and name its address"
)


@dataclass(frozen=True)
class _Resident:
    """A matrix, and where it lies on the device."""

    matrix: StoredMatrix
    elements: torch.Tensor


class DeviceClient(WorkerLink):
    """A device of this machine, as the enclave sees it. Safe from any thread.

    In a forked child `device:cpu` goes on with the matrices that it had; what was asked for before the fork is the
    parent's. A CUDA device, and a link that records, work in no forked child.
    """

    def __init__(
        self,
        computer: Computer,
        address: DeviceAddress,
        *,
        deadline_s: float = 120.0,
        memory_bytes: int | None = None,
        recorder: BusRecorder | None = None,
    ) -> None:
        """A link that holds no matrix yet.

        Args:
            computer: multiplies, on the device.
            address: the name of that device.
            deadline_s: seconds that a product is waited for.
            memory_bytes: the most that matrices may take on the device; None for all that it has.
            recorder: writes down what crosses the bus, for an audit; closed with the link.

        Raises:
            ConfigError: the device's driver does not take the memory that rows and products pass through.
        """
        self.device, self.address = computer.device, address
        self._stats, self._refusal = ClientStats(), Refusal()
        self._refusing = Refusing(self._refusal, self._refusal.declare)
        self._computer, self._deadline_s, self._recorder = computer, deadline_s, recorder
        self._most = int(memory_of_this_machine() * SHARE_OF_MEMORY) if self.device.type == "cpu" else None
        if memory_bytes is not None:
            self._most = memory_bytes
        self._host = HostMemory(SHARED_BYTES, self.device)
        self._allocator = Allocator(self._host)
        self._matrices: dict[bytes, _Resident] = {}
        self._claims: dict[bytes, int] = {}
        """Bytes on the device, also of matrices that are on their way."""
        self._underway: weakref.WeakKeyDictionary[ProductRequest, tuple[Underway, torch.Tensor]] = (
            weakref.WeakKeyDictionary()
        )
        self._running: list[Underway] = []
        """Also those whose request nobody waits for: the device still uses their memory."""
        self._lock = threading.RLock()
        self._is_closed = self._is_broken_off = self._is_of_parent = False
        self._owned: list[Callable[[], None]] = [] if recorder is None else [recorder.close]
        self._end = weakref.finalize(self, _end, self._matrices, self._running, self._host, self._owned)
        begin_anew_in_children(self)

    @classmethod
    def open(
        cls,
        address: str | DeviceAddress,
        *,
        deadline_s: float = 120.0,
        dtype: torch.dtype | None = None,
        memory_bytes: int | None = None,
        record: Path | None = None,
    ) -> Self:
        """A link to a device of this machine.

        Args:
            address: device:cuda:N, or device:cpu for tests.
            deadline_s, memory_bytes: as in the constructor.
            dtype: in which matrices are kept on the device, and multiplied; None as they are sent. A coarser one than
                the model's is refused by verification.
            record: folder for the transcript of all that crosses the bus.

        Raises:
            ConfigError: there is no such device, or it cannot be used.
            StorageError: the transcript cannot be written.

        Example:
            >>> with obfuscatune.DeviceClient.open("device:cuda:0") as device:
            ...     model = obfuscatune.load("my-model", device)
        """
        named = address if isinstance(address, DeviceAddress) else DeviceAddress.parse(address)
        device = find_device(named.device, str(named))
        recorder = None if record is None else BusRecorder(record)
        return cls(Computer(device, dtype), named, deadline_s=deadline_s, memory_bytes=memory_bytes, recorder=recorder)

    def begin_in_child(self) -> None:
        """See `process.Forkable`."""
        self._lock = threading.RLock()  # the parent's may have been held by a thread that is not here
        self._underway.clear()
        self._running.clear()
        self._is_broken_off = False
        self._host.begin_in_child()
        self._allocator.begin_in_child()
        self._is_of_parent = self.device.type != "cpu" or self._recorder is not None
        if self._is_of_parent:
            self._owned.clear()
            self._end.detach()

    @property
    def stats(self) -> ClientStats:
        """What went over the bus so far; it goes on counting."""
        return self._stats

    @property
    def computes_apart(self) -> bool:
        """Whether the device is another than this process computes on."""
        return self.device.type != "cpu"

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
        """Have W_star lie on the device under `matrix_id`; see `WorkerClient.store`.

        Raises:
            QuotaExceeded: the device has no room.
            ProtectionError: the link is closed.
            WireError: the device failed.
        """
        matrix = StoredMatrix(matrix_id, source, shape, dtype, at_hand=tensor)
        self._refuse_if_unusable()
        elements = matrix.elements()
        matrix.at_hand = None
        size = elements.numel() * (self._computer.dtype or dtype).itemsize
        with self._claimed(matrix_id, size, shape):
            if self._recorder is not None:
                self._recorder.stored(matrix, elements)
            with self._failures(f"a matrix of {shape[0]} x {shape[1]}"):
                kept = self._computer.adopt(elements)
                if kept.data_ptr() == elements.data_ptr():
                    kept = elements.clone()  # the caller's memory is used again
            with self._lock:
                self._refuse_if_unusable()
                self._matrices[matrix_id] = _Resident(matrix, kept)
                self._stats.uploads += 1
                self._stats.bytes_uploaded += matrix.nbytes
                self._stats.bytes_sent += matrix.nbytes

    def allocate(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that the device copies from by itself, while there is some: see `WorkerLink.allocate`."""
        allocated = None if self._is_of_parent else self._allocator.allocate(rows, cols, dtype)
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
    ) -> ProductRequest:
        """See `WorkerClient.submit`. A CUDA device begins at once; on the CPU whoever waits computes.

        Rows that lie elsewhere, as a fleet's do, pass through registered memory too: for any other this would wait.
        """
        self._refuse_if_unusable()
        with self._lock:
            self._refuse_if_unusable()
            resident = self._matrices.get(matrix_id)
            if resident is None:
                raise ConfigError("no matrix was stored under this id: store it first")
            if not known_finite:
                check_finite(rows)
            rows = rows.detach() if rows.requires_grad else rows
            dtype = reply_dtype or rows.dtype
            request = ProductRequest(resident.matrix, rows, transpose, dtype, self._finish, product_unchecked)
            sent, out = rows, self.allocate(*request.shape, dtype)
            if self._allocator.offset_of(rows) is None:
                sent = self.allocate(rows.shape[0], rows.shape[1], rows.dtype).copy_(rows)
            else:
                request.output = out
            if self._recorder is not None:
                self._recorder.asked(request)
            with self._failures(f"{rows.shape[0]} rows and their product"):
                underway = self._computer.start(sent, resident.elements, out, transpose=transpose)
            self._underway[request] = underway, out
            self._running.append(underway)
            self._stats.bytes_sent += request.nbytes
            return request

    def order(self, order: AdapterRequest) -> torch.Tensor | None:
        """A device holds no adapters.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self.device} only multiplies: LoRA on the worker (profile paper) takes a worker process; start one by "
            "`obfuscatune worker --device cuda` and name its address"
        )

    def forget(self, matrix_id: bytes) -> None:
        """Drop a matrix from the device, once no product needs it. One that was never stored is fine."""
        self._refusal.check()
        with self._lock:
            self._claims.pop(matrix_id, None)
            if self._matrices.pop(matrix_id, None) is not None and self._recorder is not None:
                self._recorder.forgotten(matrix_id)

    @contextmanager
    def broken_off(self) -> Iterator[None]:
        """Within it, what waits for the device in other threads fails at once."""
        self._is_broken_off = True
        try:
            yield
        finally:
            self._is_broken_off = False

    def refusing(self) -> AbstractContextManager[None]:
        """See `WorkerClient.refusing`."""
        return self._refusing

    def own(self, close: Callable[[], None]) -> None:
        """Have `close` called once the link is closed."""
        self._owned.append(close)

    def close(self) -> None:
        """Drop all matrices from the device. Nothing can be asked afterwards; twice is once."""
        with self._lock:
            self._is_closed = True
            self._end()

    def __repr__(self) -> str:
        return f"DeviceClient({self.device}, {len(self._matrices)} matrices)"

    def _finish(self, request: ProductRequest) -> None:
        """Called by `ProductRequest.result`: wait until the device is done with this one."""
        self._refusal.check()
        with self._lock:
            if request.done:
                return
            asked = self._underway.get(request)
        if asked is None:
            raise ConnectionLost("the process that this one was forked from asked for this: ask again")
        (underway, out), started = asked, time.monotonic()
        try:
            with self._failures(f"{request.rows.shape[0]} rows and their product"):
                underway.wait(self._deadline_s, self._is_to_stop)
        except DeadlineExceeded as error:
            self._refusal.check()
            if self._is_broken_off:
                raise ConnectionLost("the link to the device was broken off on this side") from error
            late = DeadlineExceeded(f"{self.device}: {error}")
            self._refusal.declare(late)
            raise late from error
        with self._lock:
            if not request.done:
                self._take(request, out)
                self._stats.seconds_waiting += time.monotonic() - started

    def _take(self, request: ProductRequest, out: torch.Tensor) -> None:
        """The product is here."""
        product = out if request.output is not None else out.clone()
        if self._recorder is not None:
            self._recorder.answered(request, product)
        request.product = product if request.product_unchecked else check_product(product)
        del self._underway[request]
        self._running[:] = [other for other in self._running if not other.is_at_rest()]
        self._stats.crossings += 1
        self._stats.bytes_received += out.nbytes

    def _is_to_stop(self) -> bool:
        return self._is_broken_off or self._refusal.is_declared

    def _refuse_if_unusable(self) -> None:
        self._refusal.check()
        if self._is_of_parent:
            raise ConfigError(NOT_IN_A_CHILD)
        if self._is_closed:
            raise ProtectionError(
                "this model's link to its device is closed, as close() and the end of a `with` leave it: load or "
                "protect the model again"
            )

    @contextmanager
    def _claimed(self, matrix_id: bytes, size: int, shape: tuple[int, int]) -> Iterator[None]:
        """Room for a matrix, taken before it is there, since several may come at a time; given back should it fail."""
        with self._lock:
            held = sum(other for name, other in self._claims.items() if name != matrix_id)
            if self._most is not None and held + size > self._most:
                taken = f"{held / MIB:.0f} of {self._most / MIB:.0f}"
                raise self._no_room(f"a matrix of {shape[0]} x {shape[1]}", taken)
            self._claims[matrix_id] = size
        try:
            yield
        except BaseException:
            with self._lock:
                self._claims.pop(matrix_id, None)
                self._matrices.pop(matrix_id, None)
            raise

    def _no_room(self, what: str, taken: str) -> QuotaExceeded:
        return QuotaExceeded(
            f"{self.device} has no room for {what}: {taken} MiB are taken; offload fewer blocks (--first-blocks), take "
            "--dtype bfloat16, or another device"
        )

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        """What torch raises for a device, as errors of ours; after a failure the device is asked nothing any more."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError):
            free, total = torch.cuda.mem_get_info(self.device) if self.device.type == "cuda" else (0, 0)
            raise self._no_room(what, f"{(total - free) / MIB:.0f} of {total / MIB:.0f}") from None
        except RuntimeError as error:
            failed: WireError = ConnectionLost(f"{self.device} failed: {(str(error).splitlines() or [''])[0][:200]}")
            self._refusal.declare(failed)
            raise failed from error


def _end(
    matrices: dict[bytes, _Resident], running: list[Underway], host: HostMemory, owned: list[Callable[[], None]]
) -> None:
    """Nothing is freed that the device may still read or write."""
    matrices.clear()
    until = time.monotonic() + CLOSING_SECONDS
    while any(not it.is_at_rest() for it in running) and time.monotonic() < until:
        time.sleep(0.001)
    if all(it.is_at_rest() for it in running):
        host.close()
        running.clear()
    else:
        _abandoned.append((running, host))
    while owned:
        owned.pop(0)()
