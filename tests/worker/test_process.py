"""The worker as a process: started without the enclave's files, stopped gracefully, and honest about a full disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import obfuscatune
from obfuscatune.enclave.client import WorkerClient
from obfuscatune.errors import StorageError, UntrustedPeer, WorkerRefused
from obfuscatune.protocol.files import write_new
from obfuscatune.protocol.tls import TlsConfig, make_identity
from obfuscatune.protocol.transcript import read_transcript

PACKAGE = Path(obfuscatune.__file__).parent
SECONDS = 60.0
ID = bytes(range(1, 17))
W = torch.arange(12, dtype=torch.float32).reshape(3, 4)
X = torch.arange(6, dtype=torch.float32).reshape(2, 3)


@contextmanager
def process(
    *arguments: str, listen: str, package_at: Path | None = None, file_bytes: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A worker process that is ready, and its address. `package_at`: folder to import from, and nowhere else."""
    isolated = [] if package_at is None else ["-P"]
    environment = dict(os.environ) if package_at is None else {**os.environ, "PYTHONPATH": str(package_at)}
    started = subprocess.Popen(
        [
            sys.executable,
            *isolated,
            "-m",
            "obfuscatune.worker",
            "--listen",
            listen,
            "--json",
            "--threads",
            "1",
            *arguments,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=None
        if file_bytes is None
        else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
    )
    with started:
        try:
            assert started.stdout is not None
            line = started.stdout.readline()
            assert line, started.stderr and started.stderr.read()
            ready = json.loads(line)
            assert (ready["event"], ready["pid"]) == ("ready", started.pid)
            yield started, ready["address"]
        finally:
            started.kill()


def exercise(address: str, **options: object) -> WorkerClient:
    """A link that has done one product, right."""
    link = WorkerClient.open(address, **options)
    link.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
    assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)
    return link


def copy_without(folder: Path, *absent: str) -> Path:
    """The package in `folder`, without some of its folders."""
    shutil.copytree(PACKAGE, folder / "obfuscatune", ignore=lambda where, names: set(absent) & set(names))
    return folder


def test_it_serves_with_the_enclave_s_files_absent(tmp_path: Path) -> None:
    others = [
        entry.name
        for entry in PACKAGE.iterdir()
        if entry.is_dir() and entry.name not in ("backend", "protocol", "worker")
    ]
    assert "enclave" in others
    alone = copy_without(tmp_path, *others)
    with process(listen=f"unix:{tmp_path}/s", package_at=alone) as (_, address):
        exercise(address).close()


def test_the_enclave_s_link_works_with_the_worker_s_files_absent(tmp_path: Path) -> None:
    script = f"""
import torch
from importlib.util import find_spec
from obfuscatune.enclave.client import WorkerClient
assert find_spec("obfuscatune.worker") is None and find_spec("obfuscatune").origin.startswith({str(tmp_path)!r})
with WorkerClient.open("unix:{tmp_path}/s") as link:
    W, X = torch.eye(3), torch.ones(2, 3)
    link.store(b"1" * 16, lambda: W, shape=(3, 3), dtype=W.dtype)
    assert torch.equal(link.multiply(b"1" * 16, X, transpose=False), X)
"""
    alone = copy_without(tmp_path, "worker")
    with process(listen=f"unix:{tmp_path}/s"):
        subprocess.run([sys.executable, "-P", "-c", script], env={**os.environ, "PYTHONPATH": str(alone)}, check=True)


def test_it_loads_nothing_that_it_does_not_need() -> None:
    script = """
import sys
import obfuscatune.worker.__main__
assert "torch" not in sys.modules  # or the process would be settled too late
import obfuscatune.worker.server
loaded = {name for name in sys.modules if name.startswith("obfuscatune.")}
shared = {"backend", "protocol", "errors", "native", "option", "version", "process", "machine"}
assert {name.split(".")[1] for name in loaded} <= {"worker", *shared}, loaded
assert not {"transformers", "peft", "typer", "pydantic"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_it_imports_nothing_from_where_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of data may hold a file of any name; `python -m` looks there first."""
    (tmp_path / "logging.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    with obfuscatune.local_worker(threads=1) as worker:
        assert worker.process.poll() is None


def test_sigterm_ends_it_gracefully(tmp_path: Path) -> None:
    record = ["--record", str(tmp_path / "t"), "--store", str(tmp_path / "matrices")]
    with process(*record, listen=f"unix:{tmp_path}/s") as (running, address):
        link = exercise(address)
        running.send_signal(signal.SIGTERM)
        assert running.wait(SECONDS) == 0
        assert running.stderr is not None
        assert "Traceback" not in running.stderr.read()
    assert not (tmp_path / "s").exists()
    assert [entry.header.type.name for entry in read_transcript(tmp_path / "t")][-2:] == ["MULTIPLY", "PRODUCT"]
    link.close()


def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    with process("--until-stdin-closes", listen=f"unix:{tmp_path}/s") as (running, _):
        assert running.stdin is not None
        running.stdin.close()
        assert running.wait(SECONDS) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "nowhere"], "cannot be used"),
        (["--listen", "tcp:0.0.0.0:0"], "without TLS"),
        (["--listen", "unix:/x", "--quota", "much"], "is no size"),
        (["--listen", "tcp:127.0.0.1:0", "--tls-cert", "/absent"], "all three"),
        (["--listen", "unix:/x", "--threads", "0"], "--threads"),
        (["--listen", "unix:/x", "--max-sessions", "0"], "--max-sessions"),
        (["--listen", "unix:/absent/s"], "cannot listen"),
        (["--listen", "unix:/absent/s", "--quota", "0"], "--quota 0"),
        (["--listen", "unix:/absent/s", "--quota", "1GiB", "--peer-quota", "2GiB"], "more than --quota"),
        (["--listen", "unix:/absent/s", "--store-quota", "1GiB"], "--store"),
        (["--listen", "unix:/absent/s", "--store", "/dev/null/x"], "cannot use --store"),
        (["--listen", "unix:/absent/s", "--store", "/tmp/x", "--record", "/tmp/../tmp/x"], "folder of its own"),
        (["--listen", "unix:/absent/s", "--device", "meta"], "write cpu, cuda or cuda:N"),
        (["--listen", "unix:/absent/s", "--max-sessions", "1000000000"], "open files"),
    ],
)
def test_options_that_cannot_be_used(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One clear line, and exit code 2. In this process: nothing gets as far as serving."""
    from obfuscatune.worker.__main__ import main
    from obfuscatune.worker.options import parse_arguments

    assert main(parse_arguments(arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_pinned_tls_between_processes(tmp_path: Path) -> None:
    for name in ("worker", "enclave", "stranger"):
        certificate, key = make_identity(name)
        (tmp_path / f"{name}.cert").write_bytes(certificate)
        write_new(tmp_path / f"{name}.key", key)

    def pinned(ours: str, theirs: str) -> TlsConfig:
        return TlsConfig(tmp_path / f"{ours}.cert", tmp_path / f"{ours}.key", tmp_path / f"{theirs}.cert")

    config = pinned("worker", "enclave")
    files = ["--tls-cert", str(config.certificate), "--tls-key", str(config.private_key), "--peer", str(config.peers)]
    with process(*files, listen="tcp:127.0.0.1:0") as (_, address):
        with exercise(address, tls=pinned("enclave", "worker")) as link:
            big = torch.randn(1500, 700)
            link.store(b"2" * 16, lambda: torch.eye(700), shape=(700, 700), dtype=torch.float32)
            pendings = [link.submit(b"2" * 16, big + i, transpose=False) for i in range(6)]
            assert all(torch.equal(pending.result(), big + i) for i, pending in enumerate(pendings))
        for config in (pinned("stranger", "worker"), pinned("enclave", "stranger")):
            with pytest.raises(UntrustedPeer):
                exercise(address, tls=config)


def test_a_full_disk_stops_a_recording_worker(tmp_path: Path) -> None:
    limit = 10_000
    with process("--record", str(tmp_path / "t"), listen=f"unix:{tmp_path}/s", file_bytes=limit) as (running, address):
        link = exercise(address)
        big = torch.ones(2000, 3)
        with pytest.raises(WorkerRefused, match="the transcript is incomplete"):
            link.multiply(ID, big, transpose=False)
        assert running.wait(SECONDS) == 1
        link.close()
    with pytest.raises(StorageError):
        list(read_transcript(tmp_path / "t"))


def test_a_full_disk_costs_a_storing_worker_only_the_copy(tmp_path: Path) -> None:
    with process("--store", str(tmp_path / "m"), listen=f"unix:{tmp_path}/s", file_bytes=1000) as (_, address):
        link = exercise(address)
        big = torch.eye(100)
        link.store(b"2" * 16, lambda: big, shape=(100, 100), dtype=torch.float32)
        assert torch.equal(link.multiply(b"2" * 16, big, transpose=False), big)
        link.close()
    (kept,) = (tmp_path / "m").iterdir()  # the small one; no half file of the big one
    assert kept.stat().st_size == W.nbytes
