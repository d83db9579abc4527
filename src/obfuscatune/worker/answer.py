"""From one request to its reply: the whole of what a worker does, without a socket."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from obfuscatune.wire.errors import AdapterLost, MalformedMessage, QuotaExceeded, StorageError, UnknownMatrix
from obfuscatune.wire.limits import MAX_MATRIX_BYTES
from obfuscatune.wire.messages import NO_DIGEST, NO_MATRIX, ErrorCode, MessageType
from obfuscatune.wire.payloads import ACCELERATOR, CONTENT_STORE, SLOTS
from obfuscatune.wire.slot import Watched
from obfuscatune.worker.answer_adapters import AdapterAnswerer
from obfuscatune.worker.buffers import Buffers
from obfuscatune.worker.compute import Computer
from obfuscatune.worker.declined import Declined
from obfuscatune.worker.disk import ContentStore
from obfuscatune.worker.replies import Reply, Request, product_of, refusal, room_for, short
from obfuscatune.worker.store import Key, MatrixStore

log = logging.getLogger(__name__)


@dataclass
class Answerer:
    """Answers requests of any session out of one store and one computer."""

    store: MatrixStore
    computer: Computer
    disk: ContentStore | None = None
    _on_adapters: AdapterAnswerer = field(init=False, repr=False)
    _answers: dict[MessageType, Callable[[bytes, Request, Buffers], Reply]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._on_adapters = AdapterAnswerer(self.store, self.computer)
        self._answers = self._on_adapters.answers | {
            MessageType.SHARE: self._share,
            MessageType.OFFER: self._offer,
            MessageType.STORE: self._store,
            MessageType.MULTIPLY: self._multiply,
            MessageType.FORGET: self._forget,
            MessageType.WATCH: self._watch,
        }

    @property
    def features(self) -> int:
        """What WELCOME says of this worker."""
        keeps = 0 if self.disk is None else CONTENT_STORE
        apart = 0 if self.computer.device.type == "cpu" else ACCELERATOR
        return keeps | apart | (SLOTS if self.computer.watches else 0)

    def answer(self, session: bytes, request: Request, buffers: Buffers) -> Reply:
        """The reply to one request of the session with that key. Refusals are replies; nothing is raised for them."""
        header = request.header
        try:
            return self._answers[header.type](session, request, buffers)
        except UnknownMatrix as error:
            return refusal(ErrorCode.UNKNOWN_MATRIX, str(error), header)
        except AdapterLost as error:
            return refusal(ErrorCode.UNKNOWN_ADAPTER, str(error), header)
        except Declined as error:
            return refusal(error.code, str(error), header)
        except QuotaExceeded as error:
            return refusal(ErrorCode.QUOTA, str(error), header)
        except (RuntimeError, MemoryError) as error:  # what torch raises, out of memory or on a device that fails
            log.error("%s failed: %s", header.type.name, error)  # noqa: TRY400 - one line, no traceback
            return refusal(ErrorCode.FAILED, str(error) or "out of memory", header)

    def _offer(self, session: bytes, request: Request, buffers: Buffers) -> Reply:
        header = request.header
        size = header.rows * header.cols * header.dtype.itemsize
        if size > MAX_MATRIX_BYTES:
            return refusal(ErrorCode.LIMIT, f"a matrix has at most {MAX_MATRIX_BYTES} bytes", header)
        key = (session, header.matrix_id)
        self.store.forget(key)
        self.store.reserve(size)
        try:
            kept = self._kept(request)
        except BaseException:
            self.store.release(size)
            raise
        if kept is None:
            self.store.release(size)  # claimed again when it comes: nothing is kept for who offers and never sends
            return short(MessageType.WANT, header)
        self._adopt(key, kept, size)
        return short(MessageType.HAVE, header)

    def _store(self, session: bytes, request: Request, buffers: Buffers) -> Reply:
        header = request.header
        matrix = request.matrix()
        if self.disk is not None:
            try:
                self.disk.save(matrix)
            except StorageError as error:  # it is in memory all the same, and can be uploaded again
                log.warning("%s", error)
        self._adopt((session, header.matrix_id), matrix, header.matrix_bytes)
        return short(MessageType.STORED, header)

    def _multiply(self, session: bytes, request: Request, buffers: Buffers) -> Reply:
        header = request.header
        matrix = self.store.get((session, header.matrix_id))
        inner, outer = matrix.shape[::-1] if header.transposed else matrix.shape
        if header.cols != inner:
            return refusal(ErrorCode.SHAPE, f"rows have {header.cols} columns, the matrix takes {inner}", header)
        product = room_for(request, outer, buffers)
        self.computer.multiply(request.matrix(), matrix, product, transpose=header.transposed)
        return product_of(request, product)

    def _watch(self, session: bytes, request: Request, buffers: Buffers) -> Reply:
        watched = Watched.unpack(request.body)
        if request.memory is None:
            raise Declined(ErrorCode.FAILED, "no memory is shared: send messages")
        matrices = [self.store.get((session, matrix_id)) for matrix_id in watched.matrix_ids]
        try:
            self.computer.watch(request.memory, watched.slot, matrices)
        except MalformedMessage as error:
            return refusal(ErrorCode.MALFORMED, str(error), last=True)
        return short(MessageType.DONE, request.header)

    def _kept(self, request: Request) -> torch.Tensor | None:
        """What was offered, where it lies on disk."""
        if self.disk is None or request.body == NO_DIGEST:
            return None
        header = request.header
        return self.disk.load(request.body, (header.rows, header.cols), header.dtype.torch_dtype)

    def _adopt(self, key: Key, matrix: torch.Tensor, reserved: int) -> None:
        """Hold a matrix for which room was claimed."""
        try:
            adopted = self.computer.adopt(matrix)
        except BaseException:
            self.store.release(reserved)
            raise
        self.store.put(key, adopted, reserved=reserved)

    def _share(self, session: bytes, request: Request, buffers: Buffers) -> Reply:
        return short(MessageType.DONE, request.header)  # the connection has mapped it, or ended

    def _forget(self, session: bytes, request: Request, buffers: Buffers) -> Reply:
        header = request.header
        if header.matrix_id == NO_MATRIX:
            self.store.forget_session(session)
        else:
            self.store.forget((session, header.matrix_id))
            self._on_adapters.adapters.forget((session, header.matrix_id))
        return short(MessageType.DONE, header)
