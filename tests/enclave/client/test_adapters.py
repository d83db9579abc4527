"""What the enclave makes of a worker that loses an adapter, or the connection within a step: one clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from obfuscatune.enclave.client import AdapterClient, RetryPolicy, WorkerClient
from obfuscatune.enclave.client.adapters import gradient_norm, step_all, zero_all
from obfuscatune.errors import AdapterLost, BadReply, ConnectionLost, NonFiniteError
from obfuscatune.protocol.messages import MessageType
from obfuscatune.protocol.payloads import Attachment, Method, Part, Slice, Step
from obfuscatune.worker.handlers import Answerer
from obfuscatune.worker.quota import Quota
from obfuscatune.worker.store import MatrixStore
from tests.enclave.client.peers import MemoryTransport, MemoryWorker

ID = bytes(range(1, 17))
W = torch.arange(6, dtype=torch.float32).reshape(2, 3)
X, G = torch.ones(1, 2), torch.ones(1, 3)
STEP = Step(Method.SGD, 1, 0.5, 0.9, 0.999, 1e-8, 0.0, 1.0)


def connected(worker: MemoryWorker) -> tuple[WorkerClient, AdapterClient]:
    client = WorkerClient(worker, deadline_s=0.5, retry=RetryPolicy(attempts=2, patience_s=1.0, backoff_s=0.001))
    client.store(ID, lambda: W, shape=(2, 3), dtype=W.dtype)
    adapter = AdapterClient(client, Attachment(ID, (Slice(0, 3, 1, 1.0, 0.0),)), (2, 3), torch.float32)
    adapter.put(0, Part.A, torch.ones(2, 1))
    adapter.put(0, Part.B, torch.ones(1, 3))
    return client, adapter


def restarted(worker: MemoryWorker) -> None:
    """As a worker that was killed and started again: it holds nothing."""
    worker.store = MatrixStore(Quota(2**20))
    worker.answerer = Answerer(worker.store, worker.answerer.computer)


def test_a_step() -> None:
    client, adapter = connected(MemoryWorker())
    assert torch.equal(adapter.forward(X, number=1, dropout=False), X @ W + 2)
    adapter.backward(G, number=1)
    assert gradient_norm(client) == pytest.approx((2 * 3**2 + 3 * 2**2) ** 0.5)
    step_all(client, STEP)
    assert torch.equal(adapter.fetch(0, Part.A), torch.full((2, 1), 1 - 0.5 * 3))
    zero_all(client)
    assert gradient_norm(client) == 0


@pytest.mark.parametrize("asked", ["forward", "backward", "fetch", "step", "norm"])
def test_a_worker_that_was_restarted(asked: str) -> None:
    """W* could be sent again; the factors cannot, and are not made up."""
    worker = MemoryWorker()
    client, adapter = connected(worker)
    adapter.forward(X, number=1, dropout=False)
    restarted(worker)
    calls: dict[str, Any] = {
        "forward": lambda: adapter.forward(X, number=2, dropout=False),
        "backward": lambda: adapter.backward(G, number=1),
        "fetch": lambda: adapter.fetch(0, Part.A),
        "step": lambda: step_all(client, STEP),
        "norm": lambda: gradient_norm(client),
    }
    with pytest.raises(AdapterLost, match="exists nowhere else: resume from the last checkpoint"):
        calls[asked]()


def test_a_matrix_that_was_evicted_is_sent_again() -> None:
    worker = MemoryWorker()
    _, adapter = connected(worker)
    for key in list(worker.store._held):
        worker.store.forget(key)
    assert torch.equal(adapter.forward(X, number=0, dropout=False), X @ W + 2)


class Breaking(MemoryTransport):
    """Takes one request of a kind, has it done, and breaks before its reply is read."""

    kind: MessageType
    broken = 0

    def _answer(self, request: Any) -> None:
        super()._answer(request)
        if request.header.type is type(self).kind and not type(self).broken:
            type(self).broken += 1
            self._replies.clear()
            self.ended = True


@pytest.mark.parametrize("kind", [MessageType.BACKWARD, MessageType.STEP], ids=lambda kind: kind.name)
def test_what_must_not_be_done_twice_is_not_sent_twice(kind: MessageType) -> None:
    worker = MemoryWorker()
    breaking = type("Once", (Breaking,), {"kind": kind})
    worker.__class__ = type("W", (MemoryWorker,), {"__call__": lambda self: breaking(self)})
    client, adapter = connected(worker)
    adapter.forward(X, number=1, dropout=False)
    with pytest.raises(AdapterLost, match=f"before the worker had answered {kind.name}"):
        adapter.backward(G, number=1)
        step_all(client, STEP)
    assert [header.type for header in worker.seen].count(kind) == 1


@pytest.mark.parametrize("kind", [MessageType.FORWARD, MessageType.ZERO, MessageType.FETCH], ids=lambda kind: kind.name)
def test_what_may_be_done_twice_is_asked_again(kind: MessageType) -> None:
    worker = MemoryWorker()
    breaking = type("Once", (Breaking,), {"kind": kind})
    worker.__class__ = type("W", (MemoryWorker,), {"__call__": lambda self: breaking(self)})
    client, adapter = connected(worker)
    assert torch.equal(adapter.forward(X, number=1, dropout=False), X @ W + 2)
    assert torch.equal(adapter.fetch(0, Part.A), torch.ones(2, 1))
    zero_all(client)
    assert [header.type for header in worker.seen].count(kind) == 2


def test_nothing_that_is_not_finite_is_sent() -> None:
    worker = MemoryWorker()
    _, adapter = connected(worker)
    seen = len(worker.seen)
    for send in (
        lambda: adapter.put(0, Part.A, torch.full((2, 1), torch.nan)),
        lambda: adapter.backward(G / 0, number=1),
    ):
        with pytest.raises(NonFiniteError, match="not sent"):
            send()
    assert len(worker.seen) == seen


def test_a_product_that_lies_is_refused() -> None:
    """Another shape than asked for, as often as it is asked."""

    def shorter(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[16:20] = (2).to_bytes(4, "little")
        changed[48:56] = (8).to_bytes(8, "little")
        return bytes(changed[: 56 + 8])

    worker = MemoryWorker()
    _, adapter = connected(worker)
    worker.mischief = shorter
    with pytest.raises((BadReply, ConnectionLost)):
        adapter.forward(X, number=1, dropout=False)
