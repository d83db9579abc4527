"""A worker in this process, on a real socket; and raw clients of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

from obfuscatune.backend import Computer
from obfuscatune.protocol.endpoints import Address, UnixAddress, connect
from obfuscatune.protocol.framing import recv_body, recv_header, recv_payload, send_message
from obfuscatune.protocol.listen import Listener
from obfuscatune.protocol.messages import FORMS, REPLIES, Header, MessageType
from obfuscatune.protocol.payloads import Hello
from obfuscatune.protocol.recorder import Recorder
from obfuscatune.protocol.tensors import bytes_of
from obfuscatune.protocol.tls import PinnedTls
from obfuscatune.protocol.transport import Buffer, Deadline
from obfuscatune.worker.connection import Service
from obfuscatune.worker.handlers import Answerer
from obfuscatune.worker.quota import Quota
from obfuscatune.worker.served import ServedWeights
from obfuscatune.worker.server import Server
from obfuscatune.worker.sessions import Sessions
from obfuscatune.worker.store import ContentStore, MatrixStore, WhenFull

SECONDS = 20.0
"""For anything here: far more than it takes, far less than for ever."""


class Serving:
    """What a test may look into while the worker serves."""

    def __init__(self, address: Address, service: Service, server: Server) -> None:
        self.address = address
        self.service = service
        self.server = server
        self.store = service.answerer.store


@contextmanager
def serving(
    folder: Path,
    *,
    quota_bytes: int = 2**24,
    when_full: WhenFull = "refuse",
    dtype: torch.dtype | None = None,
    disk: Path | None = None,
    models: Sequence[Path] = (),
    record: Path | None = None,
    max_sessions: int = 64,
    idle_seconds: float = 3600,
    listen: Address | None = None,
    tls: PinnedTls | None = None,
) -> Iterator[Serving]:
    """A worker that listens in `folder`."""
    store = MatrixStore(Quota(quota_bytes), when_full)
    sessions = Sessions(max_sessions, store, idle_seconds)
    recorder = None if record is None else Recorder(record)
    content = None if disk is None else ContentStore(disk, Quota(quota_bytes))
    listener = Listener(listen or UnixAddress(folder / "worker.sock"), tls)
    answerer = Answerer(store, Computer(torch.device("cpu"), dtype), content, ServedWeights(models) if models else None)
    service = Service(answerer, sessions, recorder, listener.stop)
    server = Server(listener, service)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield Serving(listener.address, service, server)
    finally:
        server.stop()
        thread.join(SECONDS)
        if recorder is not None:
            recorder.close()
    assert not thread.is_alive()


class RawClient:
    """Says whatever it is told to, and reads replies."""

    def __init__(self, address: Address, session_id: bytes = bytes(32), tls: PinnedTls | None = None) -> None:
        self.transport = connect(address, Deadline(SECONDS), tls)
        self.session_id = session_id

    def hello(self) -> Header:
        """Greet; the reply."""
        body = Hello(self.session_id).pack()
        self.say(Header(MessageType.HELLO, payload_bytes=len(body)), body)
        return self.reply()[0]

    def say(self, header: Header, payload: Buffer = b"") -> None:
        send_message(self.transport, header, payload, deadline=Deadline(SECONDS))

    def raw(self, data: bytes) -> None:
        self.transport.send([data], Deadline(SECONDS))

    def reply(self) -> tuple[Header, bytes | torch.Tensor]:
        header = recv_header(self.transport, REPLIES, deadline=Deadline(SECONDS))
        if not FORMS[header.type].tensor_bytes:
            return header, recv_body(self.transport, header, Deadline(SECONDS))
        tensor = torch.empty(header.rows, header.cols, dtype=header.dtype.torch_dtype)
        recv_payload(self.transport, bytes_of(tensor), Deadline(SECONDS))
        return header, tensor

    def ask(self, header: Header, payload: Buffer = b"") -> tuple[Header, bytes | torch.Tensor]:
        self.say(header, payload)
        return self.reply()

    def at_end(self) -> bool:
        """Whether the worker has closed the connection (waits for it)."""
        return self.transport.recv_into(memoryview(bytearray(1)), Deadline(SECONDS)) == 0

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.transport.close()
