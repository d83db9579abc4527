"""Systems other than Linux: all works by what they have, or one line says that it does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

import obfuscatune
from obfuscatune.cli.app import run
from obfuscatune.worker.__main__ import main
from obfuscatune.worker.options import WorkerOptions

LIKE_MACOS = """
import os, pathlib, sys
import torch
sys.platform = "darwin"
for name in ("sched_getaffinity", "sched_setaffinity", "memfd_create"):
    delattr(os, name)
import obfuscatune
from obfuscatune.enclave.client import WorkerClient
from tests.worker.serving import serving
with serving(pathlib.Path(sys.argv[1])) as worker, WorkerClient.open(str(worker.address)) as link:
    W = torch.arange(30.0).view(5, 6)
    link.store(b"1" * 16, lambda: W, shape=(5, 6), dtype=W.dtype)
    rows = link.allocate(3, 5, W.dtype).fill_(2)
    assert torch.equal(link.multiply(b"1" * 16, rows, transpose=False), rows @ W)
    assert link._driver.allocator is None
    assert worker.address.path.stat().st_mode & 0o777 == 0o600
"""


def test_without_what_linux_alone_has(tmp_path: object) -> None:
    command = [sys.executable, "-c", LIKE_MACOS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_windows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert run(["demo"]) == 2
    assert main(WorkerOptions("tcp:127.0.0.1:0")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("on Windows use it in WSL" in line for line in lines)
    vars(obfuscatune).pop("load", None)  # it is looked up when it is first used
    with pytest.raises(ImportError, match="on Windows use it in WSL"):
        _ = obfuscatune.load
