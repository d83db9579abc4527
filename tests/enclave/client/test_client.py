"""The link to an honest worker: products are exact, several may be in flight, and what is lost is sent again."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.client import RetryPolicy, WorkerClient
from obfuscatune.errors import (
    ConfigError,
    ConnectionLost,
    LimitExceeded,
    NonFiniteError,
    QuotaExceeded,
)
from obfuscatune.protocol.messages import MessageType
from tests.enclave.client.peers import MemoryWorker

ID = bytes(range(1, 17))
OTHER = bytes(range(2, 18))
W = torch.arange(12, dtype=torch.float64).reshape(3, 4)
X = torch.arange(6, dtype=torch.float64).reshape(2, 3)
G = torch.arange(8, dtype=torch.float64).reshape(2, 4)
QUICK = RetryPolicy(attempts=3, patience_s=0.05, backoff_s=0.001)


def linked(worker: MemoryWorker, **options: object) -> WorkerClient:
    """A link on which W is stored under ID."""
    client = WorkerClient(worker, deadline_s=0.05, retry=QUICK)
    client.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
    return client


def types(worker: MemoryWorker) -> list[str]:
    return [header.type.name for header in worker.seen]


def test_both_products() -> None:
    with linked(MemoryWorker()) as client:
        assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
        assert torch.equal(client.multiply(ID, G, transpose=True), G @ W.T)


@pytest.mark.parametrize("reply_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_dtype(dtype: torch.dtype, reply_dtype: torch.dtype) -> None:
    """Small whole numbers: exact in all of them."""
    with WorkerClient(MemoryWorker()) as client:
        client.store(ID, lambda: W.to(dtype), shape=(3, 4), dtype=dtype)
        product = client.multiply(ID, X.to(dtype), transpose=False, reply_dtype=reply_dtype)
        assert product.dtype == reply_dtype
        assert torch.equal(product.double(), X @ W)
        assert client.multiply(ID, X.to(dtype), transpose=False).dtype == dtype


@pytest.mark.parametrize("order", [1, -1])
def test_several_in_flight_in_either_order(order: int) -> None:
    with linked(MemoryWorker()) as client:
        rows = [X + i for i in range(20)]  # more than may be in flight at once
        pendings = [client.submit(ID, x, transpose=False) for x in rows]
        for x, pending in list(zip(rows, pendings, strict=True))[::order]:
            assert torch.equal(pending.result(), x @ W)
            assert torch.equal(pending.result(), x @ W)  # a second time too
        assert client.stats.crossings == 20


def test_from_several_threads() -> None:
    failures: list[int] = []
    with linked(MemoryWorker()) as client:

        def work(i: int) -> None:
            for _ in range(20):
                if not torch.equal(client.multiply(ID, X * i, transpose=False), X * i @ W):
                    failures.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_worker_that_lost_a_matrix_is_sent_it_again() -> None:
    worker = MemoryWorker()
    made = []
    client = WorkerClient(worker, retry=QUICK)
    client.store(ID, lambda: made.append(1) or W, shape=(3, 4), dtype=W.dtype, tensor=W)
    assert not made  # it was at hand
    worker.store.forget_session(worker.connections[0]._session)
    assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
    assert (len(made), client.stats.uploads, client.stats.reconnects) == (1, 2, 0)
    assert client.stats.bytes_uploaded == 2 * W.nbytes


def test_a_connection_that_ends_is_made_again() -> None:
    worker = MemoryWorker()
    client = linked(worker)
    worker.connections[0].ended = True
    worker.connections[0]._mute = True
    assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
    assert (client.stats.reconnects, client.stats.retries, client.stats.uploads) == (1, 1, 1)
    assert worker.connections[0].closed


def test_all_that_was_in_flight_is_sent_again() -> None:
    worker = MemoryWorker()
    client = linked(worker)
    worker.connections[0]._mute = True
    pendings = [client.submit(ID, X + i, transpose=False) for i in range(5)]
    worker.connections[0].ended = True
    assert all(torch.equal(pendings[i].result(), (X + i) @ W) for i in (3, 0, 4, 1, 2))
    assert client.stats.retries == 5
    ids = [header.request_id for header in worker.seen if header.type is MessageType.MULTIPLY]
    assert len(set(ids)) == 10  # no id is ever used twice


def test_a_worker_that_stays_away_is_given_up_with_one_clear_line() -> None:
    def nobody() -> MemoryWorker:
        raise ConnectionLost("no worker answers at unix:/x")

    client = WorkerClient(nobody, retry=QUICK)
    with pytest.raises(ConnectionLost, match=r"no worker answers at unix:/x; gave up after 0\.05 s: start the worker"):
        client.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)


def test_a_worker_that_comes_back_is_found() -> None:
    worker = MemoryWorker()
    tries = []

    def away_twice() -> object:
        tries.append(1)
        if len(tries) <= 2:
            raise ConnectionLost("no worker answers")
        return worker()

    client = WorkerClient(away_twice, retry=RetryPolicy(attempts=1, patience_s=30, backoff_s=0.001))
    client.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
    assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)


def test_a_failed_link_can_be_used_again() -> None:
    worker = MemoryWorker(mischief=lambda data: None)
    client = linked(worker)
    other = client.submit(ID, X, transpose=False)
    with pytest.raises(Exception, match="3 attempts"):
        client.multiply(ID, X, transpose=False)
    with pytest.raises(Exception, match="3 attempts"):
        other.result()  # it was in flight then
    worker.mischief = None
    assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_not_sent(bad: float) -> None:
    worker = MemoryWorker()
    with linked(worker) as client:
        rows = X.clone()
        rows[1, 1] = bad
        with pytest.raises(NonFiniteError):
            client.multiply(ID, rows, transpose=False)
        assert "MULTIPLY" not in types(worker)


def test_a_matrix_that_is_not_finite_is_not_sent() -> None:
    worker = MemoryWorker()
    with WorkerClient(worker) as client, pytest.raises(NonFiniteError):
        client.store(ID, lambda: W / 0, shape=(3, 4), dtype=W.dtype)
    assert "STORE" not in types(worker)


@pytest.mark.parametrize(
    ("rows", "transpose"),
    [(X, True), (G, False), (X[0], False), (X[:0], False), (torch.zeros(3, 2, dtype=X.dtype).t(), False)],
    ids=["shape", "shape transposed", "one-dimensional", "no rows", "not contiguous"],
)
def test_rows_that_do_not_fit(rows: torch.Tensor, transpose: bool) -> None:
    with linked(MemoryWorker()) as client, pytest.raises(ConfigError):
        client.multiply(ID, rows, transpose=transpose)


def test_matrices_that_do_not_fit() -> None:
    client = WorkerClient(MemoryWorker())
    with pytest.raises(ConfigError):
        client.store(bytes(16), lambda: W, shape=(3, 4), dtype=W.dtype)
    with pytest.raises(LimitExceeded):
        client.store(ID, lambda: W, shape=(2**21, 4), dtype=W.dtype)
    with pytest.raises(ConfigError, match="its source made"):
        client.store(ID, lambda: W, shape=(4, 3), dtype=W.dtype)
    with pytest.raises(ConfigError, match="store it first"):
        client.multiply(OTHER, X, transpose=False)


def test_quota_is_reported_and_spends_no_retries() -> None:
    worker = MemoryWorker(quota_bytes=100)
    client = linked(worker)
    with pytest.raises(QuotaExceeded, match="you have 96 of the 100"):
        client.store(OTHER, lambda: W, shape=(3, 4), dtype=W.dtype)
    assert len(worker.connections) == 1
    assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)


def test_forget_and_close_leave_nothing() -> None:
    worker = MemoryWorker()
    client = linked(worker)
    client.store(OTHER, lambda: W, shape=(3, 4), dtype=W.dtype)
    client.forget(OTHER)
    assert worker.store.held_bytes == W.nbytes
    with pytest.raises(ConfigError):
        client.multiply(OTHER, X, transpose=False)
    client.close()
    assert worker.store.held_bytes == 0
    assert worker.connections[0].closed
    client.close()  # twice is once


def test_an_interrupt_leaves_the_link_usable() -> None:
    """Ctrl-C between a request and its reply: the stale reply must not answer the next request."""
    worker = MemoryWorker()
    client = linked(worker)
    first = worker.connections[0]
    receive = first.recv_into

    def interrupted(view: memoryview, deadline: object) -> int:
        raise KeyboardInterrupt

    first.recv_into = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        client.multiply(ID, X, transpose=False)
    first.recv_into = receive  # type: ignore[method-assign]
    assert torch.equal(client.multiply(ID, 2 * X, transpose=False), 2 * X @ W)
    assert first.closed
    assert types(worker).count("MULTIPLY") == 2  # the one that was interrupted is not asked again


def test_stats_count_what_crossed() -> None:
    client = linked(MemoryWorker())
    before = client.stats.snapshot()
    client.multiply(ID, X, transpose=False)
    spent = client.stats.since(before)
    assert (spent.crossings, spent.bytes_sent, spent.bytes_received) == (1, 56 + 48, 56 + 64)
    assert (spent.uploads, spent.retries, spent.reconnects) == (0, 0, 0)


def test_opening_where_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the whole patience: that is for a worker that has been seen."""
    monkeypatch.setattr("obfuscatune.enclave.client.client.OPENING_SECONDS", 0.05)
    with pytest.raises(ConnectionLost, match=r"no worker answers at unix:.*/absent: .*; gave up after 0\.05 s"):
        WorkerClient.open(f"unix:{tmp_path}/absent")
