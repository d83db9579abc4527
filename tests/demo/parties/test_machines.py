"""Machines are apart from each other; taps forward, and keep a copy of everything."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from obfuscatune.demo.parties.machines import LOOPBACK, Machine, machines, why_not_isolated
from obfuscatune.demo.parties.programs import CommandFailed, Server, run
from obfuscatune.demo.parties.tap import Tap

SECONDS = 20.0
missing = why_not_isolated()
isolated = pytest.mark.skipif(missing is not None, reason=f"no network namespaces: {missing}")


def python(machine: Machine, code: str) -> str:
    command = [*machine.prefix, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=machine.environment, timeout=SECONDS)
    return done.stdout.strip() + done.stderr[-500:]


def echo(listener: socket.socket) -> None:
    with listener.accept()[0] as end:
        while data := end.recv(4096):
            end.sendall(data.upper())


def echoing(host: str) -> tuple[socket.socket, tuple[str, int]]:
    listener = socket.create_server((host, 0))
    threading.Thread(target=echo, args=(listener,), daemon=True).start()
    return listener, (host, listener.getsockname()[1])


def test_a_tap_forwards_and_keeps_both_directions(tmp_path: Path) -> None:
    listener, target = echoing(LOOPBACK)
    with listener, Tap(LOOPBACK, target, tmp_path / "tap.bin") as tap:
        with socket.create_connection((tap.host, tap.port), timeout=SECONDS) as end:
            end.sendall(b"hello" * 1000)
            end.shutdown(socket.SHUT_WR)
            came = b"".join(iter(lambda: end.recv(4096), b""))
        assert came == b"HELLO" * 1000
    kept = (tmp_path / "tap.bin").read_bytes()
    assert len(kept) == tap.passed == 10_000
    assert kept.count(b"h") == kept.count(b"H") == 1000


def test_a_tap_to_nowhere_closes_and_ends(tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        nowhere = taken.getsockname()
    tap = Tap(LOOPBACK, nowhere, tmp_path / "tap.bin")
    with tap, socket.create_connection((tap.host, tap.port), timeout=SECONDS) as end:
        assert end.recv(1) == b""
    with pytest.raises(OSError):
        socket.create_connection((tap.host, tap.port), timeout=SECONDS)


def test_a_machine_has_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "of whoever started the demo")
    with machines(tmp_path, ["one", "two"], isolated=False) as made:
        one = made["one"]
        assert one.folder.stat().st_mode & 0o777 == 0o700
        seen = json.loads(
            python(one, "import json, os, tempfile; print(json.dumps([dict(os.environ), tempfile.gettempdir()]))")
        )
    assert seen[1] == str(one.temporary)
    assert seen[0]["HOME"] == str(one.folder)
    assert "SECRET_TOKEN" not in seen[0]


@isolated
def test_isolated_machines_reach_each_other_through_taps_alone(tmp_path: Path) -> None:
    connect = "import socket; s = socket.create_connection(({!r}, {}), timeout=2); s.sendall(b'hi'); print(s.recv(9))"
    serve = (
        "import socket; listener = socket.create_server((%r, 7000)); print('up', flush=True); "
        "end = listener.accept()[0]; end.sendall(end.recv(9)[::-1])"
    )
    with machines(tmp_path, ["one", "two"], isolated=True) as made:
        one, two = made["one"], made["two"]
        command = [*two.prefix, sys.executable, "-c", serve % two.host]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None and server.stdout.readline() == "up\n"
            with socket.create_server((LOOPBACK, 0)) as here:  # of the demo's own machine
                for host, port in ((two.host, 7000), (LOOPBACK, here.getsockname()[1])):
                    assert "Error" in python(one, connect.format(host, port))
            with Tap(one.gateway, (two.host, 7000), tmp_path / "tap.bin") as tap:
                assert python(one, connect.format(tap.host, tap.port)) == "b'ih'"
            server.wait(SECONDS)
    named = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"obfuscatune-{os.getpid()}" not in named


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with machines(tmp_path, ["one"], isolated=False) as made, pytest.raises(CommandFailed) as error:
        run(made["one"], "keygen", "--out", tmp_path / "keys", "--name", "")
    assert error.value.reason == "--name has 1 to 64 characters"


def test_a_server_tells_when_it_is_ready_and_ends_when_it_is_told_to(tmp_path: Path) -> None:
    with machines(tmp_path, ["one"], isolated=False) as made:
        with Server(made["one"], "worker", "worker", "--listen", f"tcp:{LOOPBACK}:0", "--json") as server:
            where = json.loads(server.lines_until("{"))["address"]
            host, _, port = where.removeprefix("tcp:").rpartition(":")
            socket.create_connection((host, int(port)), timeout=SECONDS).close()
        with pytest.raises(OSError):
            socket.create_connection((host, int(port)), timeout=SECONDS)


def test_a_server_that_ends_at_once_is_told_with_its_reason(tmp_path: Path) -> None:
    with machines(tmp_path, ["one"], isolated=False) as made:
        keygen = Server(made["one"], "keygen", "keygen", "--out", tmp_path / "keys", "--name", "")
        with keygen as server, pytest.raises(CommandFailed) as error:
            server.lines_until("{")
    assert error.value.reason == "--name has 1 to 64 characters"
