"""A real worker process that is killed again and again costs nothing but time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from obfuscatune.enclave.client import RetryPolicy, WorkerClient
from obfuscatune.enclave.local_worker import local_worker
from obfuscatune.errors import ConnectionLost, DeadlineExceeded

KILLS = 10
ID = bytes(range(1, 17))


@pytest.mark.long
def test_killed_ten_times_and_every_product_is_exact() -> None:
    """SIGKILL at any moment: before, in the middle of, and between requests of 1.2 MB, several of them in flight."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randint(-8, 8, (300, 400), generator=generator).double()  # whole numbers: exact in any order of summation
    rows = torch.randint(-8, 8, (500, 300), generator=generator).double()
    expected = rows @ W
    served, over = threading.Event(), threading.Event()

    def kill() -> None:
        try:
            for _ in range(KILLS):
                served.wait()
                worker.restart()
                served.clear()  # what comes from here on, the new one has served
        finally:
            over.set()

    retry = RetryPolicy(longest_backoff_s=0.1)  # only to be quicker: the worker is back after seconds
    with local_worker(threads=1) as worker, WorkerClient.open(worker.address, retry=retry) as client:
        client.store(ID, lambda: W, shape=(300, 400), dtype=W.dtype)
        killer = threading.Thread(target=kill)
        killer.start()
        number = 0
        while not over.is_set():
            pendings = [(factor, client.submit(ID, rows * factor, transpose=False)) for factor in (1, 2, 3)]
            for factor, pending in pendings:
                assert torch.equal(pending.result(), expected * factor)
                number += 1
                served.set()
        killer.join()
        assert torch.equal(client.multiply(ID, rows, transpose=False), expected)
        assert client.stats.crossings == number + 1
        assert client.stats.reconnects >= KILLS
        assert client.stats.uploads >= KILLS


def test_a_worker_that_hangs() -> None:
    """Stopped by SIGSTOP: the kernel still takes connections for it, and nobody ever answers."""
    rows = torch.ones(500, 300)
    W = torch.eye(300)
    retry = RetryPolicy(attempts=2, backoff_s=0.001)
    with local_worker(threads=1) as worker, WorkerClient.open(worker.address, deadline_s=0.5, retry=retry) as client:
        client.store(ID, lambda: W, shape=(300, 300), dtype=W.dtype)
        os.kill(worker.pid, signal.SIGSTOP)
        os.waitpid(worker.pid, os.WUNTRACED)  # until all its threads stand still
        try:
            with pytest.raises(DeadlineExceeded, match=r"within 0\.5 s, none came; gave up after 2 attempts"):
                client.multiply(ID, rows, transpose=False)
            with pytest.raises(KeyboardInterrupt), interrupted_in(0.1):
                client.multiply(ID, rows, transpose=False)
        finally:
            os.kill(worker.pid, signal.SIGCONT)
        assert torch.equal(client.multiply(ID, rows, transpose=False), rows)


@contextmanager
def interrupted_in(seconds: float) -> Iterator[None]:
    """Ctrl-C after a while."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_worker_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(ConnectionLost, match=r"did not start; its last words: .*is no size"),
        local_worker(extra=("--quota", "x")),
    ):
        pass


def test_a_local_worker_leaves_nothing_behind() -> None:
    from obfuscatune.protocol.endpoints import UnixAddress, parse_address

    with local_worker(threads=1) as worker:
        address = parse_address(worker.address)
        assert isinstance(address, UnixAddress)
        assert address.path.parent.stat().st_mode & 0o777 == 0o700
        with WorkerClient.open(worker.address, retry=RetryPolicy(patience_s=1)):
            pass
    assert worker.process.returncode == 0
    assert not address.path.parent.exists()
