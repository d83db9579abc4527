"""From one request to its reply: the whole of what a worker does, without a socket."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from obfuscatune.wire.dtypes import DType
from obfuscatune.wire.errors import LimitExceeded, ProtocolError, QuotaExceeded, StorageError, UnknownMatrix
from obfuscatune.wire.limits import MAX_ERROR_BYTES, MAX_MATRIX_BYTES
from obfuscatune.wire.messages import NO_MATRIX, ErrorCode, Header, MessageType
from obfuscatune.wire.tensors import bytes_of
from obfuscatune.wire.transport import Buffer
from obfuscatune.worker.compute import Computer
from obfuscatune.worker.store import MatrixStore


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it was received. `tensor` (rows, cols) for STORE and MULTIPLY, `body` for the rest."""

    header: Header
    body: bytes = b""
    tensor: torch.Tensor | None = None

    @property
    def payload(self) -> Buffer:
        """The payload as it came."""
        return self.body if self.tensor is None else bytes_of(self.tensor)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply as it will be sent."""

    header: Header
    payload: Buffer = b""
    last: bool = False
    """Whether the connection ends with it."""


@dataclass
class Answerer:
    """Answers requests of any session out of one store and one computer."""

    store: MatrixStore
    computer: Computer
    _answers: dict[MessageType, Callable[[bytes, Request], Reply]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._answers = {
            MessageType.OFFER: self._offer,
            MessageType.STORE: self._store,
            MessageType.MULTIPLY: self._multiply,
            MessageType.FORGET: self._forget,
        }

    def answer(self, session: bytes, request: Request) -> Reply:
        """The reply to one request of the session with that key. Refusals are replies; nothing is raised for them."""
        header = request.header
        try:
            return self._answers[header.type](session, request)
        except UnknownMatrix as error:
            return refusal(ErrorCode.UNKNOWN_MATRIX, str(error), header)
        except QuotaExceeded as error:
            return refusal(ErrorCode.QUOTA, str(error), header)
        except (StorageError, torch.OutOfMemoryError, MemoryError) as error:
            return refusal(ErrorCode.FAILED, str(error) or "out of memory", header)

    def _offer(self, session: bytes, request: Request) -> Reply:
        header = request.header
        if header.rows * header.cols * header.dtype.itemsize > MAX_MATRIX_BYTES:
            return refusal(ErrorCode.LIMIT, f"a matrix has at most {MAX_MATRIX_BYTES} bytes", header)
        return _short(MessageType.WANT, header)

    def _store(self, session: bytes, request: Request) -> Reply:
        header = request.header
        self.store.put(
            (session, header.matrix_id), self.computer.adopt(_tensor(request)), reserved=header.payload_bytes
        )
        return _short(MessageType.STORED, header)

    def _multiply(self, session: bytes, request: Request) -> Reply:
        header = request.header
        matrix = self.store.get((session, header.matrix_id))
        inner, outer = matrix.shape[::-1] if header.transposed else matrix.shape
        if header.cols != inner:
            return refusal(ErrorCode.SHAPE, f"rows have {header.cols} columns, the matrix takes {inner}", header)
        size = header.rows * outer * header.reply_dtype.itemsize
        if size > MAX_MATRIX_BYTES:
            return refusal(ErrorCode.LIMIT, f"the product would have {size} bytes; split the rows", header)
        product = self.computer.multiply(
            _tensor(request), matrix, transpose=header.transposed, reply_dtype=header.reply_dtype.torch_dtype
        )
        return Reply(
            Header(
                MessageType.PRODUCT,
                header.request_id,
                header.matrix_id,
                DType.of(product.dtype),
                rows=header.rows,
                cols=outer,
                payload_bytes=size,
            ),
            bytes_of(product),
        )

    def _forget(self, session: bytes, request: Request) -> Reply:
        header = request.header
        if header.matrix_id == NO_MATRIX:
            self.store.forget_session(session)
        else:
            self.store.forget((session, header.matrix_id))
        return _short(MessageType.DONE, header)


def refusal(code: ErrorCode, text: str, request: Header | None = None, *, last: bool = False) -> Reply:
    """An ERROR, to one request or, without one, to the connection."""
    body = text.encode("ascii", "replace")[:MAX_ERROR_BYTES]
    body = bytes(byte if 0x20 <= byte < 0x7F else ord(" ") for byte in body) or b"no reason given"
    request_id, matrix_id = (request.request_id, request.matrix_id) if request else (0, NO_MATRIX)
    header = Header(MessageType.ERROR, request_id, matrix_id, payload_bytes=len(body), code=code)
    return Reply(header, body, last=last)


def refusal_for(error: ProtocolError) -> Reply:
    """The ERROR that ends a connection after bytes that broke the protocol."""
    code = ErrorCode.LIMIT if isinstance(error, LimitExceeded) else ErrorCode.MALFORMED
    return refusal(code, str(error), last=True)


def _short(kind: MessageType, request: Header) -> Reply:
    return Reply(Header(kind, request.request_id, request.matrix_id))


def _tensor(request: Request) -> torch.Tensor:
    if request.tensor is None:
        raise StorageError(f"{request.header.type.name} reached the worker without its matrix")
    return request.tensor
