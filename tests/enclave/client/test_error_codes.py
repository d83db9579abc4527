"""Each error code has the consequence that docs/spec/wire.md states, whatever it answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.client import WorkerClient
from obfuscatune.enclave.client.connection import REFUSALS
from obfuscatune.errors import (
    AdapterLost,
    LimitExceeded,
    ProtocolError,
    QuotaExceeded,
    UnknownMatrix,
    UnsupportedVersion,
    WireError,
    WorkerRefused,
)
from obfuscatune.protocol.messages import REPLIES, ErrorCode, Header, MessageType
from tests.enclave.client.peers import MemoryTransport, MemoryWorker, Mischief
from tests.enclave.client.test_client import ID, OTHER, QUICK, W, X, linked

SPEC = (Path(__file__).parents[3] / "docs" / "spec" / "wire.md").read_text()
REMEDIES = dict(re.findall(r"^\| \d \| ([A-Z_]+) \| .* \| ([^|]+?) \|$", SPEC.split("\n## Errors")[1], re.MULTILINE))
ERRORS: dict[ErrorCode, type[WireError]] = {
    ErrorCode.MALFORMED: ProtocolError,
    ErrorCode.VERSION: UnsupportedVersion,
    ErrorCode.LIMIT: LimitExceeded,
    ErrorCode.UNKNOWN_MATRIX: UnknownMatrix,
    ErrorCode.QUOTA: QuotaExceeded,
    ErrorCode.SHAPE: WorkerRefused,
    ErrorCode.BUSY: WorkerRefused,
    ErrorCode.FAILED: WorkerRefused,
    ErrorCode.UNKNOWN_ADAPTER: AdapterLost,
}
ANEW = {ErrorCode.MALFORMED}
STORED_AGAIN = {ErrorCode.UNKNOWN_MATRIX}


class Refusing(MemoryTransport):
    """Answers each request of one type with an error, to it or to all."""

    def __init__(self, worker: RefusingWorker) -> None:
        super().__init__(worker)
        self._refusing = worker

    def _say(self, data: bytes, mischief: Mischief | None) -> None:
        kind, code, answers = self._refusing.kind, self._refusing.code, self._refusing.answers
        if self._refusing.seen[-1].type is not kind:
            super()._say(data, mischief)
            return
        header = Header.unpack(data, expected=REPLIES)
        named = (header.request_id, header.matrix_id) if answers else (0, bytes(16))
        super()._say(Header(MessageType.ERROR, *named, payload_bytes=2, code=code).pack() + b"no", None)


class RefusingWorker(MemoryWorker):
    def __init__(self, kind: MessageType, code: ErrorCode, *, answers: bool) -> None:
        super().__init__()
        self.kind, self.code, self.answers = kind, code, answers

    def __call__(self) -> MemoryTransport:
        self.connections.append(Refusing(self))
        return self.connections[-1]


def test_the_table_here_is_that_of_the_page() -> None:
    assert set(REMEDIES) == {code.name for code in ErrorCode}
    assert {code for code in ErrorCode if REMEDIES[code.name].startswith("connects anew")} == ANEW
    assert {code for code in ErrorCode if REMEDIES[code.name].startswith("stores it again")} == STORED_AGAIN
    assert REFUSALS == ERRORS


@pytest.mark.parametrize("answers", [True, False], ids=["to the request", "to all"])
@pytest.mark.parametrize("kind", [MessageType.OFFER, MessageType.STORE, MessageType.FORGET])
@pytest.mark.parametrize("code", ErrorCode)
def test_what_has_the_connection_to_itself(code: ErrorCode, kind: MessageType, answers: bool) -> None:
    """A matrix that is refused is refused once: to send gigabytes again would not make room for them."""
    worker = RefusingWorker(MessageType.HELLO, code, answers=answers)
    worker.kind = MessageType.NORM  # none, at first
    client = linked(worker)
    worker.kind = kind
    with pytest.raises(ERRORS[code], match="the worker answered: no"):
        if kind is MessageType.FORGET:
            client.forget(ID)
        else:
            client.store(OTHER, lambda: W, shape=(3, 4), dtype=W.dtype)
    tries = QUICK.attempts if code in ANEW else 1
    assert len(worker.connections) == tries
    assert [header.type for header in worker.seen].count(kind) == tries + (kind is not MessageType.FORGET)
    assert_usable(worker, client)


@pytest.mark.parametrize("answers", [True, False], ids=["to the request", "to all"])
@pytest.mark.parametrize("code", ErrorCode)
def test_multiply(code: ErrorCode, answers: bool) -> None:
    worker = RefusingWorker(MessageType.MULTIPLY, code, answers=answers)
    client = linked(worker)
    with pytest.raises(ERRORS[code], match="the worker answered: no"):
        client.multiply(ID, X, transpose=False)
    again = code in STORED_AGAIN and answers
    assert len(worker.connections) == (QUICK.attempts if code in ANEW else 1)
    assert client.stats.uploads == 1 + (QUICK.attempts if again else 0)
    assert_usable(worker, client)


@pytest.mark.parametrize("code", ErrorCode)
def test_hello(code: ErrorCode) -> None:
    worker = RefusingWorker(MessageType.HELLO, code, answers=False)
    client = WorkerClient(worker, deadline_s=0.05, retry=QUICK)
    with pytest.raises(ERRORS[code], match="the worker answered: no"):
        client.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
    assert len(worker.connections) == (QUICK.attempts if code in ANEW else 1)


def assert_usable(worker: RefusingWorker, client: WorkerClient) -> None:
    worker.kind = MessageType.NORM
    client.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
    assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
