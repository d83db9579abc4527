"""Ten thousand mutated requests: typed errors or requests within the limits, and no memory on a stranger's word."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from obfuscatune.backend import Computer
from obfuscatune.errors import ConnectionLost, WireError
from obfuscatune.protocol.limits import MAX_WINDOW_BYTES
from obfuscatune.protocol.messages import DROPOUT, Header, MessageType
from obfuscatune.protocol.payloads import Attachment, Hello, Method, Offer, Part, Slice, Step
from obfuscatune.protocol.tensors import DType
from obfuscatune.protocol.transport import Buffer, Deadline
from obfuscatune.worker import buffers as buffers_module
from obfuscatune.worker.buffers import Buffers
from obfuscatune.worker.connection import Connection, Service
from obfuscatune.worker.handlers import Answerer, Request
from obfuscatune.worker.quota import Quota
from obfuscatune.worker.request_reader import RequestReader
from obfuscatune.worker.sessions import Sessions, session_key
from obfuscatune.worker.store import MatrixStore
from tests.protocol.mutation import mutated

ID = bytes(range(1, 17))
X = torch.arange(6, dtype=torch.float32).reshape(2, 3)
QUOTA = 2**20
ADAPTER = bytes(range(2, 18))
ATTACHMENT = Attachment(ID, (Slice(0, 3, 1, 2.0, 0.5),))
STEP = Step(Method.ADAMW, 1, 0.1, 0.9, 0.999, 1e-8, 0.0, 1.0)
HELLO = Header(MessageType.HELLO, payload_bytes=36).pack() + Hello(bytes(32)).pack()
REQUESTS = [
    Header(MessageType.OFFER, 1, ID, DType.FLOAT32, 2, 3, 32).pack() + bytes(32),
    Header(MessageType.STORE, 2, ID, DType.FLOAT32, 2, 3, 24).pack() + X.numpy().tobytes(),
    Header(MessageType.MULTIPLY, 3, ID, DType.FLOAT32, 2, 2, 16, DType.BFLOAT16).pack() + bytes(16),
    Header(MessageType.ATTACH, 5, ADAPTER, DType.FLOAT32, 2, 3, 44).pack() + ATTACHMENT.pack(),
    Header(MessageType.PUT, 6, ADAPTER, DType.FLOAT32, 2, 1, 8, code=Part.A.number(0)).pack() + bytes(8),
    Header(MessageType.FORWARD, 7, ADAPTER, DType.FLOAT32, 2, 2, 16, DType.FLOAT32, DROPOUT, 1).pack() + bytes(16),
    Header(MessageType.BACKWARD, 8, ADAPTER, DType.FLOAT32, 2, 3, 24, DType.FLOAT32, 0, 1).pack() + bytes(24),
    Header(MessageType.NORM, 9).pack(),
    Header(MessageType.STEP, 10, payload_bytes=56).pack() + STEP.pack(),
    Header(MessageType.FETCH, 11, ADAPTER, code=Part.B.number(0)).pack(),
    Header(MessageType.FORWARD, 12, ADAPTER, DType.FLOAT32, 2, 2, 16, DType.FLOAT32, 0, 2).pack() + bytes(16),
    Header(MessageType.OFFER, 13, ID, DType.FLOAT32, 2, 3, 96).pack() + Offer(bytes(32), (bytes(32), bytes(32))).pack(),
    Header(MessageType.FORGET, 4, ID).pack(),
]


class Tape:
    """A transport that plays bytes, and keeps what is said to it."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.said = bytearray()
        self.closed = False

    shares_memory = False
    is_local = False

    def take_descriptor(self) -> int | None:
        return None

    def send(self, buffers: Sequence[Buffer], deadline: Deadline, descriptor: int | None = None) -> None:
        self.send_now(buffers)

    def send_now(self, buffers: Sequence[Buffer]) -> list[memoryview]:
        for buffer in buffers:
            self.said += buffer
        return []

    def recv_into(self, view: memoryview, deadline: Deadline) -> int:
        came = min(len(view), len(self._data))
        view[:came] = self._data[:came]
        self._data = self._data[came:]
        return came

    def stop_sending(self) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each buffer asked for. None of them is really had: the largest is as large as all is allowed to be."""
    sizes: list[int] = []
    take = buffers_module.Buffers._take

    def counting(self: Buffers, size: int) -> torch.Tensor:
        sizes.append(size)
        return take(self, size)

    monkeypatch.setattr(buffers_module.Buffers, "_take", counting)
    return sizes


def test_the_intake(asked: list[int]) -> None:
    dice = random.Random(20261123)
    refused = 0
    for _ in range(10_000):
        asked.clear()
        store = MatrixStore(Quota(QUOTA))
        reader = RequestReader(Tape(mutated(dice.choice(REQUESTS), dice)), session_key("peer", ID), store, Buffers())
        try:
            for _ in range(10):
                item = reader.next()
                if isinstance(item, Request) and item.claim is not None:
                    item.claim.release()
        except WireError:
            refused += 1
        assert sum(asked) <= MAX_WINDOW_BYTES
        assert store.held_bytes == 0  # no claim is left behind
    assert refused == 10_000  # if only because the tape ends


def test_claims_of_requests_that_nobody_answers_are_given_back() -> None:
    """The peer goes away while several matrices wait to be stored."""

    class Deaf(Tape):
        def send_now(self, buffers: Sequence[Buffer]) -> list[memoryview]:
            if self.said:
                raise ConnectionLost("gone")
            return super().send_now(buffers)

    store = MatrixStore(Quota(QUOTA))
    service = Service(Answerer(store, Computer(torch.device("cpu"))), Sessions(4, store))
    Connection(Deaf(HELLO + REQUESTS[0] + 5 * REQUESTS[1]), "peer", service).serve()
    assert store.held_bytes == 0


def test_whole_connections() -> None:
    dice = random.Random(20261123)
    reached = 0
    for _ in range(1_000):
        store = MatrixStore(Quota(QUOTA))
        service = Service(Answerer(store, Computer(torch.device("cpu"))), Sessions(4, store))
        tape = Tape(HELLO + mutated(b"".join(REQUESTS), dice) if dice.random() < 0.9 else mutated(HELLO, dice))
        Connection(tape, "peer", service).serve()
        assert tape.closed
        attached = service.answerer._on_adapters.adapters._held
        reached += bool(attached)
        for session in list(service.sessions._sessions):
            store.forget_session(session)
        assert store.held_bytes == 0  # factors, moments, and what no backward pass came for
    assert reached > 50
