"""A worker process of our own: ends with its object, wherever its folder lies and whatever OpenMP is told."""

from __future__ import annotations

import gc
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from obfuscatune import load, protect
from obfuscatune.assets import tiny_model_path
from obfuscatune.enclave.client import WorkerClient
from obfuscatune.enclave.local_worker import local_worker
from obfuscatune.errors import ConfigError, StorageError
from obfuscatune.protocol.files import temporary_root


def folder_of(address: str) -> Path:
    return Path(address.removeprefix("unix:")).parent


def test_it_serves_without_a_with_until_it_is_closed() -> None:
    worker = local_worker(threads=1)
    WorkerClient.open(worker.address).close()
    folder = folder_of(worker.address)
    worker.close()
    worker.close()
    assert worker.process.returncode == 0
    assert not folder.exists()
    assert "closed" in repr(worker)


def test_the_object_in_place_of_its_address_is_refused() -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path())
    with local_worker(threads=1) as worker:
        with pytest.raises(ConfigError, match=r"pass .*\.address"):
            protect(model, worker)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"pass .*\.address"):
            load(tiny_model_path(), worker)  # type: ignore[arg-type]
    assert not hasattr(model, "protection")


def test_it_ends_with_its_object() -> None:
    worker = local_worker(threads=1)
    process, folder = worker.process, folder_of(worker.address)
    del worker
    gc.collect()
    assert process.returncode == 0
    assert not folder.exists()


def test_it_ends_with_the_process() -> None:
    script = "import obfuscatune; worker = obfuscatune.local_worker(threads=1); print(worker.address)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not done.stderr
    assert not folder_of(done.stdout.strip()).exists()


def test_a_worker_that_does_not_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(Exception, match="is no size"):
        local_worker(extra=("--quota", "x"))
    assert not list(tmp_path.iterdir())


def test_a_long_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's path has some hundred bytes: its folder is made elsewhere, for this user alone."""
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with local_worker(threads=1) as worker, WorkerClient.open(worker.address):
        assert stat.S_IMODE(folder_of(worker.address).stat().st_mode) == 0o700
    assert not list(deep.iterdir())


def test_no_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was removed, or never could be written to, is a refusal that names TMPDIR."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match=r"gone: set TMPDIR"):
        temporary_root()
    monkeypatch.setattr("obfuscatune.protocol.files._SHORT_FOLDERS", ())
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with pytest.raises(StorageError, match="set TMPDIR to a shorter one"):
        local_worker(threads=1)

    def refuse() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    with pytest.raises(StorageError, match=r"No usable temporary directory .* set TMPDIR"):
        temporary_root(for_socket=True)


BOUND = """
import os
cores = os.sched_getaffinity(0)
import torch
torch.ones(300, 300) @ torch.ones(300, 300)
import obfuscatune
with obfuscatune.local_worker() as worker:
    print(len(cores), len(os.sched_getaffinity(0)), len(os.sched_getaffinity(worker.pid)))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no threads")
def test_a_worker_is_not_bound_to_the_core_that_openmp_bound_us_to() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["OMP_PROC_BIND"] = "close"
    done = subprocess.run([sys.executable, "-c", BOUND], env=environment, capture_output=True, text=True, check=True)
    all_cores, ours, workers = map(int, done.stdout.split())
    if ours == all_cores:
        pytest.skip("OpenMP bound nothing: there is one core, or another OpenMP")
    assert workers == all_cores
