"""A request as it came, and a reply as it will go."""

from dataclasses import dataclass

import torch

from obfuscatune.wire.errors import MalformedMessage
from obfuscatune.wire.limits import MAX_ERROR_BYTES
from obfuscatune.wire.messages import NO_MATRIX, ErrorCode, Header, MessageType
from obfuscatune.wire.tensors import bytes_of
from obfuscatune.wire.transport import Buffer


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it was received. `tensor` (rows, cols) for STORE and MULTIPLY, `body` for the rest."""

    header: Header
    body: bytes = b""
    tensor: torch.Tensor | None = None
    landing: torch.Tensor | None = None
    """Where in shared memory the product is to be laid, as bytes; None where it goes back as a payload."""

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


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply as it will be sent."""

    header: Header
    payload: Buffer = b""
    last: bool = False
    """Whether the connection ends with it."""
    product: torch.Tensor | None = None
    """The product: in shared memory, or the memory of `payload`, lent by the connection's buffers."""


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
