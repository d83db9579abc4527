"""A forked child shares no connection with its parent, and its end changes nothing for the parent."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.client import WorkerClient
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.enclave.spill_store import SpillStore
from obfuscatune.errors import ConfigError, ConnectionLost
from obfuscatune.protocol.endpoints import parse_address
from obfuscatune.protocol.tls import PinnedTls
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import backward, batch, largest_deviation, protected, with_lora
from tests.protocol.peers import identity, make_identities
from tests.worker.serving import serving

pytestmark = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")

LLAMA = ARCHITECTURES["llama"]
ID = bytes(range(1, 17))
W = torch.arange(600 * 500, dtype=torch.float64).remainder(17).view(600, 500)
X = torch.arange(40 * 600, dtype=torch.float64).remainder(13).view(40, 600)
"""Whole numbers: exact in any order of summation."""
SECONDS = 60


def stored(client: WorkerClient) -> WorkerClient:
    client.store(ID, lambda: W, shape=(600, 500), dtype=W.dtype)
    return client


def product(client: WorkerClient, factor: float) -> torch.Tensor:
    """By shared memory where there is some."""
    rows = client.allocate(*X.shape, X.dtype).copy_(X * factor)
    return client.multiply(ID, rows, transpose=False).clone()


def fork(child: Callable[[], object]) -> int:
    """A child that runs `child` and ends as a worker of multiprocessing does: 0 where it raised nothing."""
    pid = os.fork()
    if pid:
        return pid
    try:
        child()
    except BaseException as error:
        os.write(2, f"in the child: {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(script: str, *arguments: object) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_parent_and_child_multiply_at_the_same_time(worker: LocalWorker) -> None:
    with stored(WorkerClient.open(worker.address)) as client:
        assert torch.equal(product(client, 1), X @ W)

        def multiply(first: int) -> None:
            for factor in range(first, first + 40):
                if not torch.equal(product(client, factor), X @ W * factor):
                    raise AssertionError(f"another's product came, in turn {factor}")

        child = fork(lambda: multiply(1000))
        multiply(2)
        assert exit_code(child) == 0
        assert torch.equal(product(client, 3), X @ W * 3)
        assert client.stats.reconnects == 0


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_parent_and_child_call_a_protected_model_at_the_same_time(
    worker: LocalWorker, dtype: torch.dtype, rounding: float
) -> None:
    """Few rows and many, forward and backward. Another's product would be off by its own size."""
    plain = with_lora(LLAMA.build(dtype))
    batches = batch((4,), 97), batch((9, 30), 97)
    expected = [backward(plain, each)[1] for each in batches]
    with protected(LLAMA.build(dtype), worker) as model:
        adapted = with_lora(model)

        def call() -> None:
            for _ in range(3):
                for each, gradients in zip(batches, expected, strict=True):
                    if largest_deviation(gradients, backward(adapted, each)[1]) > rounding:
                        raise AssertionError("another's product came")

        call()
        child = fork(call)
        call()
        assert exit_code(child) == 0
        assert model.protection.stats.reconnects == 0


def test_over_tls_too(tmp_path: Path) -> None:
    """Where a byte from the wrong process would end the parent's connection."""
    make_identities(tmp_path)
    pinned = PinnedTls(identity(tmp_path, "worker", "enclave"), server=True)
    ours = identity(tmp_path, "enclave", "worker")
    with (
        serving(tmp_path, listen=parse_address("tcp:127.0.0.1:0"), tls=pinned) as there,
        stored(WorkerClient.open(str(there.address), tls=ours)) as client,
    ):
        assert exit_code(fork(lambda: (product(client, 2), client.close()))) == 0
        assert torch.equal(product(client, 3), X @ W * 3)
        assert (client.stats.reconnects, client.stats.uploads) == (0, 1)


def test_what_the_parent_asked_for_is_refused_in_the_child(worker: LocalWorker) -> None:
    with stored(WorkerClient.open(worker.address)) as client:
        pending = client.submit(ID, X, transpose=False)

        def wait() -> None:
            with pytest.raises(ConnectionLost, match="forked"):
                pending.result()

        assert exit_code(fork(wait)) == 0
        assert torch.equal(pending.result(), X @ W)


def test_a_lock_that_another_thread_holds_is_free_in_the_child(worker: LocalWorker) -> None:
    with stored(WorkerClient.open(worker.address)) as client:
        product(client, 1)
        held, over = threading.Event(), threading.Event()

        def hold() -> None:
            allocator = client._driver.allocator
            assert allocator is not None
            with client._lock, allocator._lock:
                held.set()
                over.wait(SECONDS)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(SECONDS)
        child = fork(lambda: (product(client, 2), client.close()))
        over.set()
        thread.join()
        assert exit_code(child) == 0


def test_a_child_that_closes_the_link_closes_its_own(worker: LocalWorker) -> None:
    with stored(WorkerClient.open(worker.address)) as client:
        assert exit_code(fork(client.close)) == 0
        assert torch.equal(product(client, 2), X @ W * 2)
        assert (client.stats.reconnects, client.stats.uploads) == (0, 1)


SYS_EXIT = """
import os, sys
import obfuscatune
with obfuscatune.local_worker(threads=1) as worker:
    child = os.fork()
    if child == 0:
        sys.exit()  # unwinds the `with`, and runs what is registered for the end
    os.waitpid(child, 0)
    there = os.path.exists(worker.address.removeprefix("unix:"))
    print(worker.process.poll(), there)
"""


def test_a_child_that_exits_leaves_worker_and_socket() -> None:
    assert run(SYS_EXIT) == "None True\n"


def test_a_child_cannot_restart_its_parents_worker(worker: LocalWorker) -> None:
    def restart() -> None:
        with pytest.raises(ConfigError, match="the process that started it"):
            worker.restart()

    pid = worker.pid
    assert exit_code(fork(restart)) == 0
    assert (worker.pid, worker.process.poll()) == (pid, None)


OUTLIVED = """
import os, sys
import obfuscatune
worker = obfuscatune.local_worker(threads=1)
print(worker.pid, flush=True)
if os.fork() == 0:
    os.close(1)
    sys.stdin.read()  # until the test is over
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system tells nobody when another's child ends")
def test_the_worker_ends_with_the_process_that_started_it_though_a_child_lives() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", OUTLIVED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = os.pidfd_open(int(parent.stdout.readline()))
        poll = select.poll()
        poll.register(worker, select.POLLIN)
        assert poll.poll(SECONDS * 1000)
        os.close(worker)


def test_matrices_on_disk_outlive_a_child(tmp_path: Path) -> None:
    spill_store = [SpillStore(tmp_path)]
    kept = [spill_store[0].keep(W)]

    def forget() -> None:
        kept.clear()
        spill_store.clear()

    assert exit_code(fork(forget)) == 0
    assert torch.equal(kept[0](), W)
