"""From one request to its reply: the whole of what a worker does, without a socket."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from obfuscatune.backend import Computer
from obfuscatune.errors import AdapterLost, MalformedMessage, QuotaExceeded, StorageError, UnknownMatrix
from obfuscatune.protocol.limits import MAX_MATRIX_BYTES
from obfuscatune.protocol.messages import NO_MATRIX, ErrorCode, MessageType
from obfuscatune.protocol.payloads import ACCELERATOR, CONTENT_STORE, NO_DIGEST, SERVES_WEIGHTS, Offer
from obfuscatune.worker.adapter_handlers import AdapterAnswerer
from obfuscatune.worker.buffers import Buffers
from obfuscatune.worker.quota import SessionKey
from obfuscatune.worker.replies import Reply, Request, RequestError, product_of, refusal, room_for, short
from obfuscatune.worker.served import ServedWeights
from obfuscatune.worker.sessions import MOST_PRODUCTS, Turns
from obfuscatune.worker.store import ContentStore, MatrixStore

log = logging.getLogger(__name__)


@dataclass
class Answerer:
    """Answers requests of any session out of one store and one computer."""

    store: MatrixStore
    computer: Computer
    disk: ContentStore | None = None
    served: ServedWeights | None = None
    turns: Turns = field(default_factory=Turns)
    _on_adapters: AdapterAnswerer = field(init=False, repr=False)
    _answers: dict[MessageType, Callable[[SessionKey, Request, Buffers], Reply]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._on_adapters = AdapterAnswerer(self.store, self.computer, self.turns)
        self._answers = self._on_adapters.answers | {
            MessageType.SHARE: self._share,
            MessageType.OFFER: self._offer,
            MessageType.STORE: self._store,
            MessageType.MULTIPLY: self._multiply,
            MessageType.FORGET: self._forget,
        }

    @property
    def features(self) -> int:
        """What WELCOME says of this worker."""
        keeps = 0 if self.disk is None else CONTENT_STORE
        apart = 0 if self.computer.device.type == "cpu" else ACCELERATOR
        return keeps | apart | (0 if self.served is None else SERVES_WEIGHTS)

    def answer(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        """The reply to one request of a session. Refusals are replies; nothing is raised for them."""
        header = request.header
        try:
            return self._answers[header.type](session, request, buffers)
        except UnknownMatrix as error:
            return refusal(ErrorCode.UNKNOWN_MATRIX, str(error), header)
        except AdapterLost as error:
            return refusal(ErrorCode.UNKNOWN_ADAPTER, str(error), header)
        except RequestError as error:
            return refusal(error.code, str(error), header)
        except QuotaExceeded as error:
            return refusal(ErrorCode.QUOTA, str(error), header)
        except (RuntimeError, MemoryError) as error:  # what torch raises, out of memory or on a device that fails
            log.error("%s failed: %s", header.type.name, error)  # noqa: TRY400 - one line, no traceback
            return refusal(ErrorCode.FAILED, str(error) or "out of memory", header)

    def _offer(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        header = request.header
        size = header.rows * header.cols * header.dtype.itemsize
        if size > MAX_MATRIX_BYTES:
            return refusal(ErrorCode.LIMIT, f"a matrix has at most {MAX_MATRIX_BYTES} bytes", header)
        key, offer = (session, header.matrix_id), Offer.unpack(request.body)
        shape, dtype = (header.rows, header.cols), header.dtype.torch_dtype
        self.store.forget(key)
        served = None if self.served is None else self.served.find(offer.weights, shape, dtype, self.computer.adopt)
        if served is not None:
            self.store.share(key, served)
            return short(MessageType.HAVE, header)
        self.store.check(session, size)
        if self.disk is None or offer.content == NO_DIGEST or not self.disk.holds(offer.content, shape, dtype):
            return short(MessageType.WANT, header)  # claimed when it comes: nothing gives way to who never sends
        with self.store.reserve(session, size) as claim:
            kept = self.disk.load(session, offer.content, shape, dtype)
            if kept is None:
                return short(MessageType.WANT, header)
            self.store.put(key, self.computer.adopt(kept), claim)
        return short(MessageType.HAVE, header)

    def _store(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        header, claim = request.header, request.claim
        if claim is None:
            raise MalformedMessage("STORE came without a claim for its room")
        matrix = request.matrix()
        if self.disk is not None:
            try:
                self.disk.save(session, matrix)
            except (StorageError, QuotaExceeded) as error:  # it is in memory all the same, and can be uploaded again
                log.warning("%s", error)
        self.store.put((session, header.matrix_id), self.computer.adopt(matrix), claim)
        return short(MessageType.STORED, header)

    def _multiply(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        header = request.header
        matrix = self.store.get((session, header.matrix_id))
        inner, outer = matrix.shape[::-1] if header.transposed else matrix.shape
        if header.cols != inner:
            return refusal(ErrorCode.SHAPE, f"rows have {header.cols} columns, the matrix takes {inner}", header)
        product = room_for(request, outer, buffers)
        for rows, out in _parts(request.matrix(), product.matrix, MOST_PRODUCTS // (inner * outer)):
            with self.turns.of(session.peer):
                self.computer.multiply(rows, matrix, out, transpose=header.transposed)
        return product_of(request, product)

    def _share(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        return short(MessageType.DONE, request.header)  # the connection has mapped it, or ended

    def _forget(self, session: SessionKey, request: Request, buffers: Buffers) -> Reply:
        header = request.header
        if header.matrix_id == NO_MATRIX:
            self.store.forget_session(session)
        else:
            self.store.forget((session, header.matrix_id))
            self._on_adapters.adapters.forget((session, header.matrix_id))
        return short(MessageType.DONE, header)


def _parts(rows: torch.Tensor, out: torch.Tensor, most: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Rows and where their product goes, as they are where there are no more than `most`, else by parts of so many."""
    if len(rows) <= most:
        return ((rows, out),)
    return zip(rows.split(max(most, 1)), out.split(max(most, 1)), strict=True)
