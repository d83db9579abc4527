"""Messages over a transport. Sizes are checked before memory is asked for; payloads land in the caller's own buffer."""

from obfuscatune.errors import BadMagic, ConnectionLost, Truncated
from obfuscatune.protocol.limits import CHUNK_BYTES
from obfuscatune.protocol.messages import HEADER_BYTES, MAGIC, Header, MessageType, what_it_speaks
from obfuscatune.protocol.transport import NEVER, Buffer, Deadline, Transport


def send_message(
    transport: Transport, header: Header, payload: Buffer = b"", *, deadline: Deadline, descriptor: int | None = None
) -> int:
    """Send one message; `payload` has header.payload_bytes bytes. Returns the bytes sent."""
    transport.send([header.pack(), payload], deadline, descriptor)
    return HEADER_BYTES + len(payload)


def recv_header(
    transport: Transport,
    expected: frozenset[MessageType],
    *,
    deadline: Deadline = NEVER,
    rest_seconds: float | None = None,
) -> Header:
    """Receive and check one header.

    Raises:
        ProtocolError: see `Header.unpack`. Else as `recv_header_bytes`, whose arguments it takes.
    """
    return Header.unpack(recv_header_bytes(transport, deadline, rest_seconds), expected=expected)


def recv_header_bytes(transport: Transport, deadline: Deadline, rest_seconds: float | None = None) -> bytearray:
    """Receive the 56 bytes of a header; nothing is checked but the beginning of what is no whole one.

    Args:
        transport: where from.
        deadline: for the first byte, and for the rest unless `rest_seconds` is given.
        rest_seconds: time for the rest once the first byte is there: a peer may be silent, but not in the middle of a
            word.

    Raises:
        ConnectionLost: the peer closed between two messages.
        BadMagic: it speaks another protocol.
        Truncated: it closed inside the header.
    """
    data = bytearray(HEADER_BYTES)
    view = memoryview(data)
    came = transport.recv_into(view, deadline)
    if came == HEADER_BYTES:
        return data
    if came == 0:
        raise ConnectionLost("the peer closed the connection")
    if not data.startswith(MAGIC[:came]):  # what is no header need not be as long as one
        raise BadMagic(f"expected the magic {MAGIC!r}, got {bytes(data[: min(came, 4)])!r}: {what_it_speaks(data)}")
    recv_payload(transport, view[came:], deadline if rest_seconds is None else Deadline(rest_seconds))
    return data


def recv_body(transport: Transport, header: Header, deadline: Deadline) -> bytes:
    """The payload of a message that carries no matrix; its form bounds it to a few hundred bytes."""
    body = bytearray(header.payload_bytes)
    recv_payload(transport, memoryview(body), deadline)
    return bytes(body)


def recv_payload(transport: Transport, view: memoryview, deadline: Deadline) -> None:
    """Fill `view`, in place.

    Raises:
        Truncated: the peer closed before it was full.
    """
    done, size = 0, len(view)
    while done < size:
        came = transport.recv_into(view[done : done + CHUNK_BYTES], deadline)
        if came == 0:
            raise Truncated(f"the stream ended inside a message: {size - done} of {size} bytes are missing")
        done += came
