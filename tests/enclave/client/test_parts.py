"""A product that is asked for in parts: the same rows in the same order, and the same product, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.client import RetryPolicy, WorkerClient
from obfuscatune.enclave.client import client as module
from obfuscatune.enclave.client.scheduler import Scheduler
from obfuscatune.errors import BadReply, ConfigError
from obfuscatune.protocol.messages import MessageType
from obfuscatune.protocol.transcript import read_transcript
from tests.enclave.client.peers import MemoryTransport, MemoryWorker
from tests.worker.serving import serving

ID = bytes(range(1, 17))
ROWS, P, Q = 150, 12, 7
W = torch.arange(P * Q, dtype=torch.float64).reshape(P, Q)
X = torch.arange(ROWS * P, dtype=torch.float64).reshape(ROWS, P)
G = torch.arange(ROWS * Q, dtype=torch.float64).reshape(ROWS, Q)
QUICK = RetryPolicy(attempts=3, patience_s=0.05, backoff_s=0.001)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 32 rows and 1 KiB, so that few rows are several parts."""
    monkeypatch.setattr(module, "PART_ROWS", 32)
    monkeypatch.setattr(module, "PART_BYTES", 1024)


@pytest.fixture
def worker() -> MemoryWorker:
    return MemoryWorker(quota_bytes=2**24)


@pytest.fixture
def client(worker: MemoryWorker) -> Iterator[WorkerClient]:
    """A link on which W is stored under ID."""
    with WorkerClient(worker, deadline_s=0.05, retry=QUICK) as client:
        client.store(ID, lambda: W, shape=(P, Q), dtype=W.dtype)
        yield client


def multiplied(worker: MemoryWorker) -> list[int]:
    """Rows of each request to multiply."""
    return [header.rows for header in worker.seen if header.type is MessageType.MULTIPLY]


@pytest.mark.parametrize("transpose", [False, True])
def test_the_product_is_that_of_one_request(worker: MemoryWorker, client: WorkerClient, transpose: bool) -> None:
    rows, matrix = (G, W.T) if transpose else (X, W)
    pending = client.submit(ID, rows, transpose=transpose)
    product = pending.result()
    assert torch.equal(product, rows @ matrix)
    assert product.is_contiguous()
    assert pending.own(pending.result()) is product
    assert (pending.dtype, pending.rows.data_ptr()) == (torch.float64, rows.data_ptr())
    assert multiplied(worker) == [38, 38, 37, 37]
    assert client.stats.crossings == 4


def test_little_goes_in_one_request(
    worker: MemoryWorker, client: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.multiply(ID, X[:63], transpose=False)  # two parts would have fewer rows than one may have
    monkeypatch.setattr(module, "PART_BYTES", ROWS * (P + Q) * 8 // 2 + 1)  # or fewer bytes
    client.multiply(ID, X, transpose=False)
    assert multiplied(worker) == [63, ROWS]


def test_a_worker_on_the_same_cores_is_asked_once(
    worker: MemoryWorker, client: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the link is busy with nothing but copies by the cores that would multiply."""
    monkeypatch.setattr(MemoryTransport, "is_local", True)
    assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
    assert multiplied(worker) == [ROWS]


def test_a_connection_that_breaks_in_the_middle(worker: MemoryWorker, client: WorkerClient) -> None:
    """What was not answered is sent again, and the answers are laid where they belong."""
    answered = []

    def break_the_third(data: bytes) -> bytes:
        answered.append(data)
        return data[:40] if len(answered) == 3 else data

    worker.mischief = break_the_third
    assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
    assert client.stats.retries > 0
    assert client.stats.reconnects == 1


def test_every_part_is_looked_at(worker: MemoryWorker, client: WorkerClient) -> None:
    products = []

    def nan_in_the_last(data: bytes) -> bytes:
        products.append(data)
        return data if len(products) < 4 else data[:-8] + b"\xff" * 8

    worker.mischief = nan_in_the_last
    with pytest.raises(BadReply, match="NaN or infinity"):
        client.multiply(ID, X, transpose=False)


def test_rows_that_do_not_fit_are_refused_before_anything_is_sent(worker: MemoryWorker, client: WorkerClient) -> None:
    with pytest.raises(ConfigError, match=r"expected rows of \(m, 12\)"):
        client.multiply(ID, G, transpose=False)
    assert multiplied(worker) == []


def test_a_real_worker_sees_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "computes_apart", True)
    monkeypatch.setattr(Scheduler, "allocator", None)  # nothing of another host's memory is shared
    with serving(tmp_path, record=tmp_path / "seen") as there, WorkerClient.open(str(there.address)) as client:
        client.store(ID, lambda: W, shape=(P, Q), dtype=W.dtype)
        for _ in range(20):
            assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
    seen = [it.tensor for it in read_transcript(tmp_path / "seen") if it.header.type is MessageType.MULTIPLY]
    assert len(seen) == 80
    assert all(torch.equal(torch.cat([it for it in seen[i : i + 4] if it is not None]), X) for i in range(0, 80, 4))
