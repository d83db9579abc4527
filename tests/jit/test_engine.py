"""Code is compiled once, whichever threads ask for it first."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from obfuscatune.jit.engine import compiled_once


def test_threads_that_ask_together_get_what_was_compiled_once() -> None:
    begun, may_end = threading.Event(), threading.Event()
    compiled: list[int] = []

    @compiled_once
    def compile_for(itemsize: int) -> object:
        compiled.append(itemsize)
        begun.set()
        assert may_end.wait(60)
        return object()

    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(compile_for(4))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    may_end.set()
    for thread in threads:
        thread.join()
    assert compiled == [4]
    assert len(found) == 4
    assert len(set(map(id, found))) == 1
    assert compile_for(8) is not found[0]


def test_what_failed_is_tried_again() -> None:
    turns: list[int] = []

    @compiled_once
    def compile_at_last() -> int:
        turns.append(1)
        if len(turns) == 1:
            raise RuntimeError("no")
        return 7

    with pytest.raises(RuntimeError):
        compile_at_last()
    assert compile_at_last() == compile_at_last() == 7
    assert len(turns) == 2


WITHOUT_EXECUTABLE_MEMORY = """
import ctypes, sys
prctl = ctypes.CDLL(None, use_errno=True).prctl
PR_SET_MDWE, REFUSE_EXEC_GAIN = 65, 1
if prctl(PR_SET_MDWE, *map(ctypes.c_ulong, (REFUSE_EXEC_GAIN, 0, 0, 0))):
    sys.exit("this kernel refuses no executable memory")
import torch
from torch import nn
import obfuscatune
from obfuscatune.enclave import kernels
from obfuscatune.enclave.link import WorkerLink
assert not kernels.are_there()
with obfuscatune.local_worker(threads=1) as worker, WorkerLink.open(worker.address) as link:
    W = torch.arange(64.0 * 64).remainder(7).view(64, 64)
    link.store(b"1" * 16, lambda: W, shape=(64, 64), dtype=W.dtype)
    for rows in (4, 200):
        X = torch.arange(64.0 * rows).remainder(5).view(rows, 64)
        assert torch.equal(link.multiply(b"1" * 16, X, transpose=False), X @ W)
    assert worker.process.poll() is None
    print(worker.messages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's way to refuse executable memory")
def test_where_no_memory_may_be_made_executable_torch_computes() -> None:
    """In the enclave and in its worker, which inherits that; said in one line by each."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXECUTABLE_MEMORY], capture_output=True, text=True)
    if "this kernel refuses no" in done.stderr:
        pytest.skip("the kernel is older than 6.3")
    assert done.returncode == 0, done.stderr
    line = "torch computes in place of compiled kernels, which takes longer: "
    assert done.stderr.count(line) == 1, done.stderr
    assert done.stdout.count(line) == 1, done.stdout
    assert "no memory executable (Permission denied)" in done.stderr
