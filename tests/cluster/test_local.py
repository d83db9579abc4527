"""A fleet of processes on this machine: what is listed is reached by TLS under the authority, and ends with `down`."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from obfuscatune.cluster.authority import Authority
from obfuscatune.errors import ConfigError, UntrustedPeer
from obfuscatune.fleet.discovery import Discovery
from obfuscatune.fleet.members import Member
from obfuscatune.protocol.authority import check_issued, load_authority, load_one, make_request
from obfuscatune.protocol.endpoints import connect, parse_address
from obfuscatune.protocol.tls import PinnedTls, TlsConfig
from obfuscatune.protocol.transport import Deadline
from tests.cluster.fleets import SECONDS, Up, fleet, make_enclave, up


def reach(member: Member, enclave: Path) -> None:
    """A handshake with a member, its own key pinned."""
    pinned = enclave / "member.pem"
    pinned.write_bytes(member.certificate or b"")
    tls = PinnedTls(TlsConfig(enclave / "cert.pem", enclave / "key.pem", pinned), server=False)
    connect(parse_address(member.address), Deadline(SECONDS), tls).close()


def worker_pids(supervisor: Up) -> list[int]:
    children = Path(f"/proc/{supervisor.process.pid}/task/{supervisor.process.pid}/children")
    every = [*Path(f"/proc/{supervisor.process.pid}/task").glob("*/children"), children]
    return sorted({int(pid) for file in every for pid in file.read_text().split()})


def ended(pids: list[int]) -> bool:
    """Whether all of these end soon."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([descriptor], [], [], SECONDS)[0]:
                return False
        finally:
            os.close(descriptor)
    return True


def test_a_fleet_from_up_to_down(tmp_path: Path) -> None:
    state, enclave = tmp_path / "state", make_enclave(tmp_path / "enclave")
    options = ("--memory", "64MiB", "--operator", "cloud-a")
    with up(state, enclave, *options) as supervisor:
        issuer = load_authority((state / "authority" / "cert.pem").read_bytes())
        assert supervisor.ready["authority"] == Authority.load(state / "authority").fingerprint

        def policy(member: Member) -> None:
            check_issued(load_one(member.certificate or b""), issuer)

        found = Discovery(supervisor.ready["url"], policy, say=pytest.fail)
        assert [(it.operator, it.party, it.memory) for it in found.members] == [("cloud-a", "compute", 2**26)]
        reach(found.members[0], enclave)
        with pytest.raises(UntrustedPeer):  # one worker does not pass for the other
            other = Authority.load(state / "authority").issue(make_request("other")[0], "cloud-a other")
            reach(Member(found.members[0].address, other, "cloud-a", "compute"), enclave)

        supervisor.wait_for("running at")
        os.kill(worker_pids(supervisor)[0], signal.SIGKILL)
        supervisor.wait_for("running at")
        before = found.members
        assert found.refresh() == before  # at the same address, with the same key
        reach(before[0], enclave)

        again = subprocess.run(
            [sys.executable, "-m", "obfuscatune", "fleet", "up", "--state", str(state), "--peer", enclave / "cert.pem"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert (again.returncode, again.stderr.count("\n")) == (2, 1)
        assert "up already" in again.stderr

        listed = fleet("status", "--state", str(state))["members"]
        assert [(it["address"], it["reachable"]) for it in listed] == [(it.address, True) for it in before]

        pids = worker_pids(supervisor)
        assert len(pids) == 1
        assert fleet("down", "--state", str(state)) == {"supervisor_stopped": True, "actors_ended": 0}
        assert ended(pids)
        assert supervisor.process.wait(SECONDS) == 0
    assert fleet_files(state) == {"authority", "fleet.json", "lock"}


def fleet_files(state: Path) -> set[str]:
    return {it.name for it in state.iterdir()}


@pytest.mark.long
def test_workers_end_with_a_supervisor_that_is_killed_and_leave_no_key(tmp_path: Path) -> None:
    state, enclave, temporary = tmp_path / "state", make_enclave(tmp_path / "enclave"), tmp_path / "tmp"
    temporary.mkdir()
    with up(state, enclave, env={"TMPDIR": str(temporary)}) as supervisor:
        pids = worker_pids(supervisor)
        supervisor.process.kill()
        assert ended(pids)
    assert list(temporary.glob("obfuscatune-node-*/key.pem"))  # nobody was left to remove it
    with up(state, enclave, env={"TMPDIR": str(temporary)}):  # but the next place does
        assert len(list(temporary.glob("obfuscatune-node-*"))) == 1
    assert not list(temporary.glob("obfuscatune-node-*"))


@pytest.mark.parametrize("ports", ["0", "7600-7500", "x", "7600-70000", "-1"])
def test_ports_that_are_no_range_are_refused(ports: str) -> None:
    from obfuscatune.cli.fleet import _ports

    with pytest.raises(ConfigError):
        _ports(ports)


def test_an_authority_is_not_overwritten(tmp_path: Path) -> None:
    made = Authority.create(tmp_path / "a", "cloud-a")
    with pytest.raises(ConfigError, match="not overwritten"):
        Authority.create(tmp_path / "a", "cloud-a")
    assert Authority.load(tmp_path / "a") == made
    assert made.key not in repr(made).encode()
    (tmp_path / "a" / "key.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="open to others"):
        Authority.load(tmp_path / "a")
