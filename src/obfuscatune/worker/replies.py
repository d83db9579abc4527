"""A request as it came, and a reply as it will go."""

from dataclasses import dataclass

import torch

from obfuscatune.errors import MalformedMessage, WorkerRefused
from obfuscatune.protocol.limits import MAX_ERROR_BYTES, MAX_WINDOW_BYTES
from obfuscatune.protocol.messages import NO_MATRIX, SHARED, ErrorCode, Header, MessageType
from obfuscatune.protocol.shared_memory import Place
from obfuscatune.protocol.tensors import DType, bytes_of
from obfuscatune.protocol.transport import Buffer
from obfuscatune.worker.buffers import Buffers, MatrixBuffer
from obfuscatune.worker.quota import Claim

NO_BYTES = memoryview(b"")


class RequestError(WorkerRefused):
    """One request is refused; the connection goes on."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(slots=True)
class Request:
    """A request as it was received. `tensor` (rows, cols) where it carries a matrix, `body` for the rest."""

    header: Header
    body: bytes = b""
    tensor: torch.Tensor | None = None
    buffer: MatrixBuffer | None = None
    """The memory of `tensor`, where the connection's buffers lent it."""
    output: Place | None = None
    """Where in shared memory the product is to be laid; None where it goes back as a payload."""
    claim: Claim | None = None
    """Of a STORE: the room that was claimed for its matrix."""

    @property
    def payload(self) -> Buffer:
        """The payload as it came."""
        return self.body if self.tensor is None else bytes_of(self.tensor)

    def matrix(self) -> torch.Tensor:
        """The matrix that it carries (rows, cols).

        Raises:
            MalformedMessage: it carries none.
        """
        if self.tensor is None:
            raise MalformedMessage(f"{self.header.type.name} came without its matrix")
        return self.tensor


@dataclass(slots=True)
class Reply:
    """A reply as it will be sent."""

    header: Header
    payload: Buffer = b""
    last: bool = False
    """Whether the connection ends with it."""
    product: MatrixBuffer | None = None
    """The product: in shared memory, or lent by the connection's buffers, and then the memory of `payload`."""


def room_for(request: Request, cols: int, buffers: Buffers) -> MatrixBuffer:
    """Memory for the product of a request, one row for each of its rows: where it says, or lent by the buffers.

    Raises:
        RequestError: it is too large to be sent, or for its place.
    """
    header = request.header
    dtype, output = header.reply_dtype.torch_dtype, request.output
    size = header.rows * cols * dtype.itemsize
    if size > MAX_WINDOW_BYTES:
        raise RequestError(ErrorCode.LIMIT, f"the product would have {size} bytes; split the rows")
    if output is None:
        return buffers.allocate(header.rows, cols, dtype)
    if output.nbytes < size:
        raise RequestError(ErrorCode.LIMIT, f"the product has {size} bytes, there is room for {output.nbytes}")
    return MatrixBuffer((header.rows, cols, dtype), output.matrix(header.rows, cols, dtype), NO_BYTES)


def product_of(request: Request, out: MatrixBuffer) -> Reply:
    """The PRODUCT that brings `out`, from `room_for` or the buffers."""
    rows, cols, dtype = out.kind
    header = Header(
        MessageType.PRODUCT,
        request.header.request_id,
        request.header.matrix_id,
        DType.of(dtype),
        rows=rows,
        cols=cols,
        payload_bytes=len(out.view),
        flags=0 if request.output is None else SHARED,
    )
    return Reply(header, out.view, product=out)


def refusal(code: ErrorCode, text: str, request: Header | None = None, *, last: bool = False) -> Reply:
    """An ERROR, to one request or, without one, to the connection."""
    body = text.encode("ascii", "replace")[:MAX_ERROR_BYTES]
    body = bytes(byte if 0x20 <= byte < 0x7F else ord(" ") for byte in body) or b"no reason given"
    request_id, matrix_id = (request.request_id, request.matrix_id) if request else (0, NO_MATRIX)
    header = Header(MessageType.ERROR, request_id, matrix_id, payload_bytes=len(body), code=code)
    return Reply(header, body, last=last)


def short(kind: MessageType, request: Header) -> Reply:
    """A reply that carries nothing but what it answers."""
    return Reply(Header(kind, request.request_id, request.matrix_id))
