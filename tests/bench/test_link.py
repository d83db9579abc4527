"""A worker behind each kind of link, and the network that is emulated between two namespaces."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config

from obfuscatune.bench import network as network_module
from obfuscatune.bench import step as step_module
from obfuscatune.bench.compare import compare
from obfuscatune.bench.link import KINDS, LinkSettings, linked_worker
from obfuscatune.bench.network import AT_A_TIME, WORKER_HOST, Link, Network, emulated_network, within
from obfuscatune.bench.step import OWN_WAITING, StepBench
from obfuscatune.errors import ConfigError

CAN_EMULATE = os.geteuid() == 0 and shutil.which("ip") is not None and Path("/dev/net/tun").exists()
needs_namespaces = pytest.mark.skipif(not CAN_EMULATE, reason="network namespaces take root, `ip` and /dev/net/tun")
TEN_SECONDS = 10.0


def namespaces() -> set[str]:
    """Those of this process's benchmarks."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {name for line in listed.splitlines() if (name := line.split()[0]).startswith(f"obfuscatune-{os.getpid()}-")}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.long) for kind in KINDS])
def test_a_worker_multiplies_behind_each_link(kind: str) -> None:
    rows, matrix = torch.randn(3, 8), torch.randn(8, 5)
    with linked_worker(kind, 1) as (client, worker, clock):
        assert worker.address.startswith("unix:" if kind == "unix" else "tcp:127.0.0.1:")
        client.store(b"m" * 16, lambda: matrix, shape=(8, 5), dtype=matrix.dtype)
        assert torch.allclose(client.multiply(b"m" * 16, rows, transpose=False), rows @ matrix, atol=1e-5)
        assert clock.totals.seconds > 0
    assert worker.process.poll() is not None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (LinkSettings("udp"), "unix, tcp, tls"),
        (LinkSettings(delay_ms=1), "--link tcp or tls"),
        (LinkSettings("tcp", delay_ms=-1), "at least 0"),
        (LinkSettings("tls", gbit=0), "and --gbit more"),
        (LinkSettings("tcp", delay_ms=float("nan")), "at least 0"),
        (LinkSettings("tcp", gbit=float("inf")), "and --gbit more"),
    ],
)
def test_a_link_that_there_is_not_is_refused(settings: LinkSettings, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings.check()


def test_who_may_not_make_namespaces_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_module.os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="run as root"), LinkSettings("tcp", delay_ms=1).network():
        pass


def test_results_over_different_links_are_not_compared(tmp_path: Path) -> None:
    bench = {"work": "step", "shape": "gpt2", "layers": None, "batch": 2, "length": 256, "threads": 2}
    machine = {"processor": "p", "cores": "2", "system": "s"}
    kept = {"bench": bench, "environment": machine, "protected": {"private": {"ratio": 1.2}}}
    (tmp_path / "2026-01-01.json").write_text(json.dumps(kept))
    default = {**kept, "bench": {**bench, "link": {"kind": "unix", "delay_ms": None, "gbit": None}}}
    over_tls = {**kept, "bench": {**bench, "link": {"kind": "tls", "delay_ms": None, "gbit": None}}}
    assert compare(default, tmp_path)[0].kept == 1.2
    with pytest.raises(ConfigError, match="no result of this work"):
        compare(over_tls, tmp_path)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket, socket.socket, socket.socket]]:
    """What the two sides hold, and the ends that a `Link` passes packets between."""
    one, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    other, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    sockets = one, end, other, other_end
    for sock in sockets:
        sock.setblocking(False)
    yield sockets
    for sock in sockets:
        sock.close()


@given(packets=st.lists(st.binary(min_size=1, max_size=2000), max_size=2 * AT_A_TIME))
def test_packets_arrive_whole_in_order_and_not_before_their_time(packets: list[bytes]) -> None:
    one, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    other, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, end, other, other_end:
        for sock in (one, end, other, other_end):
            sock.settimeout(TEN_SECONDS)
        os.set_blocking(end.fileno(), False)
        os.set_blocking(other_end.fileno(), False)
        started = time.monotonic()
        with network_module._passing(Link(end.fileno(), other_end.fileno(), 0.002, None)):
            came = []
            for packet in packets:
                one.send(packet)
                came.append(other.recv(4096))
        assert came == packets
        assert time.monotonic() - started >= 0.002 * len(packets)


def test_a_rate_holds_packets_back(pair: tuple[socket.socket, ...]) -> None:
    one, end, other, other_end = pair
    link = Link(end.fileno(), other_end.fileno(), 0.0, 8e-5)  # 10,000 bytes a second
    started = time.monotonic()
    with network_module._passing(link):
        for _ in range(4):
            one.send(bytes(500))
        for _ in range(4):
            assert select.select([other], [], [], TEN_SECONDS)[0]
            other.recv(4096)
    assert time.monotonic() - started >= 0.2


def test_more_than_the_queue_holds_is_dropped(pair: tuple[socket.socket, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    one, end, _, other_end = pair
    monkeypatch.setattr(network_module, "QUEUED_BYTES", 1000)
    link = Link(end.fileno(), other_end.fileno(), 60.0, None)
    for _ in range(4):
        one.send(bytes(400))
    link._take(end.fileno())
    assert link._queued_bytes == 800
    assert len(link._due[other_end.fileno()]) == 2


@needs_namespaces
def test_a_round_trip_over_the_emulated_network_takes_its_delay() -> None:
    program = (
        "import socket,sys\n"
        "with socket.create_server((sys.argv[1], 0)) as it:\n"
        "    print(it.getsockname()[1], flush=True)\n"
        "    sock, _ = it.accept()\n"
        "    while data := sock.recv(65536): sock.sendall(data)\n"
    )
    asking = (
        "import socket,sys,time\n"
        "sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)\n"
        "sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n"
        "best = 9\n"
        "for _ in range(5):\n"
        "    at = time.perf_counter(); sock.sendall(b'x'); sock.recv(1); best = min(best, time.perf_counter() - at)\n"
        "sent = bytes(range(256)) * 4096\n"
        "sock.sendall(sent); came = b''\n"
        "while len(came) < len(sent): came += sock.recv(1 << 20)\n"
        "from obfuscatune.protocol.transport import SocketTransport\n"
        "print(best, came == sent, SocketTransport(sock, 'the worker').is_local)\n"
    )
    with emulated_network(20.0, None) as network:
        assert namespaces() == {network.enclave, network.worker}
        there = [*within(network.worker), sys.executable, "-c", program, WORKER_HOST]
        with subprocess.Popen(there, stdout=subprocess.PIPE, text=True) as answering:
            assert answering.stdout is not None
            port = answering.stdout.readline().strip()
            here = [*within(network.enclave), sys.executable, "-c", asking, WORKER_HOST, port]
            seconds, intact, is_local = subprocess.run(here, capture_output=True, text=True, check=True).stdout.split()
    assert 0.020 <= float(seconds) < 1.0
    assert intact == "True"
    assert is_local == "False"  # so an enclave works on while a worker there computes
    assert not namespaces()


@needs_namespaces
@pytest.mark.long
@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_work_is_timed_over_the_emulated_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Literal["tcp", "tls"]
) -> None:
    GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=64, n_positions=32).save_pretrained(tmp_path)
    monkeypatch.setattr(step_module, "PLAIN_WAITING", {"brief": OWN_WAITING})
    link = LinkSettings(kind, delay_ms=5.0, gbit=1.0)
    bench = StepBench(
        shape=str(tmp_path / "config.json"), length=16, threads=1, rounds=2, warmup=0, link=link, profiles=("guarded",)
    )
    measured = bench.run(lambda line: None)
    guarded = measured.protected["guarded"]
    assert measured.difference("guarded") < 1e-5
    assert guarded.seconds > 0.005 * guarded.median("crossings")
    assert json.loads(json.dumps(measured.as_json()))["bench"]["link"] == {"kind": kind, "delay_ms": 5.0, "gbit": 1.0}
    assert f"link: {kind}, 5 ms, 1 Gbit/s" in measured.as_markdown()
    assert not namespaces()


@needs_namespaces
def test_after_a_failure_the_network_is_gone() -> None:
    def fail() -> None:
        with emulated_network(1.0, None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not namespaces()


@needs_namespaces
def test_what_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    run = network_module._ip

    def broken(*arguments: str) -> None:
        if arguments[-2:] == ("lo", "up"):
            raise ConfigError("no such luck")
        run(*arguments)

    monkeypatch.setattr(network_module, "_ip", broken)
    with pytest.raises(ConfigError, match="no such luck"), emulated_network(1.0, None):
        pass
    assert not namespaces()


@needs_namespaces
def test_interrupted_the_command_leaves_no_namespace() -> None:
    program = (
        "import sys; from obfuscatune.bench.network import emulated_network\n"
        "with emulated_network(1.0, None) as network:\n"
        "    print(network.worker, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        assert process.wait(TEN_SECONDS) != 0
    assert name.startswith("obfuscatune-")
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert name not in listed


def test_nothing_stands_before_a_command_in_ones_own_namespace() -> None:
    assert within(None) == ()
    assert within(Network("a", "b").worker) == ("ip", "netns", "exec", "b")
