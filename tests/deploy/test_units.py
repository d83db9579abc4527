"""systemd's units run commands that exist, and programs of ours work inside their sandbox."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deploy import units
from tests.deploy.command_lines import check_command_line

NAMES = ("obfuscatune-worker.service", "obfuscatune-enclave.service")
HARDENED = {
    "NoNewPrivileges": "yes",
    "MemoryDenyWriteExecute": "yes",
    "LimitCORE": "0",
    "PrivateTmp": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateDevices": "yes",
    "ProtectKernelTunables": "yes",
    "RestrictNamespaces": "yes",
    "SystemCallArchitectures": "native",
    "UMask": "0077",
}
SECONDS = 60.0
sandboxed = pytest.mark.skipif(units.unavailable() is not None, reason=str(units.unavailable()))


@pytest.mark.parametrize("name", NAMES)
def test_units_run_what_exists(name: str) -> None:
    program, *arguments = units.command(units.FOLDER / name)
    assert program == "/opt/obfuscatune/bin/python"
    check_command_line(arguments)


@pytest.mark.parametrize("name", NAMES)
def test_units_are_hardened(name: str) -> None:
    found = units.settings(units.FOLDER / name)
    assert {key: found.get(key, [""])[-1] for key in HARDENED} == HARDENED


@sandboxed
@pytest.mark.parametrize("name", NAMES)
def test_systemd_finds_little_exposed(name: str) -> None:
    """At most 2.0 of its 10, where 9.6 is a service with no sandbox."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(units.FOLDER / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def run_confined(unit: str, *command: str) -> subprocess.Popen[str]:
    """A Python program inside a unit's sandbox; `command` is what follows `python`."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.deploy.units", unit, sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@contextmanager
def confined_worker(folder: Path) -> Iterator[str]:
    """The address of a worker inside its unit's sandbox."""
    arguments = ["--listen", "tcp:127.0.0.1:0", "--store", str(folder), "--json", "--until-stdin-closes"]
    process = run_confined(NAMES[0], "-P", "-m", "obfuscatune.worker", *arguments)
    with process:
        try:
            assert process.stdout is not None and process.stderr is not None
            ready, _, _ = select.select([process.stdout], [], [], SECONDS)
            line = process.stdout.readline() if ready else ""
            assert line, process.stderr.read() if ready else "no ready line"
            yield json.loads(line)["address"]
        finally:
            process.terminate()


@sandboxed
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
def test_a_protected_model_answers_inside_both_sandboxes(dtype: str, tmp_path: Path) -> None:
    """bfloat16, because there oneDNN would compile kernels at run time."""
    with confined_worker(tmp_path) as address:
        asked = ["--prompt", "Once upon a time", "--max-new-tokens", "3", "--dtype", dtype, "--worker", address]
        process = run_confined(NAMES[1], "-P", "-m", "obfuscatune", "generate", *asked)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert out.startswith("Once upon a time")
    assert list(tmp_path.iterdir()), "the worker kept nothing in its store"


FORBIDDEN = {
    "write and execute": "import mmap; mmap.mmap(-1, 4096, prot=7)",
    "another network": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "chroot": "import os; os.chroot('/')",
    "mount": "import ctypes as c; c.CDLL(None).mount(0, b'/', 0, 0, 0) < 0 and exec('raise OSError')",
    "another process's memory": "import ctypes as c; c.CDLL(None).ptrace(16, 1, 0, 0) < 0 and exec('raise OSError')",
    "core dumps": "import resource as r; r.setrlimit(r.RLIMIT_CORE, (1, 1))",
}


@sandboxed
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_sandbox_refuses(name: str, what: str) -> None:
    process = run_confined(name, "-c", FORBIDDEN[what])
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode != 0 and any(it in err for it in ("OSError", "PermissionError", "ValueError")), err


@sandboxed
def test_the_enclave_serves_inside_its_sandbox(tmp_path: Path) -> None:
    """All of it: the attested channel's TLS, which makes callbacks for OpenSSL, and the API."""
    from obfuscatune.cli.keygen import keygen

    keygen(tmp_path / "platform")
    (tmp_path / "service.yaml").write_text(
        f"{{listen: '127.0.0.1:0', channel: '127.0.0.1:0', state: {tmp_path / 'state'}, bundles: [{tmp_path}], "
        f"worker: {{address: 'unix:{tmp_path / 'none.s'}'}}, "
        f"attestation: {{producer: simulated, key_file: {tmp_path / 'platform' / 'key.pem'}}}}}"
    )
    command = ("-P", "-m", "obfuscatune", "serve", "--config", str(tmp_path / "service.yaml"), "--json")
    with run_confined(NAMES[1], *command) as process:
        assert process.stdout is not None and process.stderr is not None
        ready, _, _ = select.select([process.stdout], [], [], SECONDS)
        said = process.stdout.readline() if ready else ""
        process.terminate()
        assert said == "{\n", process.stderr.read()
    assert process.returncode == 0
