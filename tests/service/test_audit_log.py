"""The audit log: what is appended is there, what is changed is noticed, whoever is not meant reads digests alone."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.channel.audit_chain import Head, verify_copy
from obfuscatune.errors import ConfigError, IntegrityError, StorageError
from obfuscatune.service import audit_log as module
from obfuscatune.service.audit_log import AuditLog

KEY = Ed25519PrivateKey.generate()
KEYS = frozenset({KEY.public_key().public_bytes_raw().hex()})


def filled(path: Path, count: int = 5) -> AuditLog:
    log = AuditLog(path, KEY)
    for number in range(count):
        log.append("one" if number % 2 else "two", "event", {"number": number})
    return log


def copy(log: AuditLog, who: str | None = None) -> bytes:
    return b"".join(log.copy_for(who))


@pytest.fixture(scope="module")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuditLog]:
    path = tmp_path_factory.mktemp("long") / "log"
    filled(path, 300).close()
    log = AuditLog(path, KEY)  # which has read its offsets, and adds to them
    for number in range(300):
        log.append("two", "event", {"number": number})
    yield log
    log.close()


def chain_after(path: Path, count: int) -> bytes:
    lines = path.read_bytes().splitlines()
    return bytes.fromhex(json.loads(lines[count - 1])["chain"]) if count else bytes(32)


def test_a_copy_verifies_and_hides_others(tmp_path: Path) -> None:
    log = filled(tmp_path / "log")
    head, clear = verify_copy(io.BytesIO(copy(log, "one")), KEYS)
    assert (head.count, clear) == (5, 2)
    assert b'"two"' not in copy(log, "one")
    assert verify_copy(io.BytesIO(copy(log)), KEYS)[1] == 5
    log.close()


def test_it_goes_on_after_a_restart(tmp_path: Path) -> None:
    log = filled(tmp_path / "log")
    earlier = Head.from_signed(log.head(), KEYS)
    log.close()
    other = Ed25519PrivateKey.generate()
    again = AuditLog(tmp_path / "log", other)
    again.append("one", "more")
    keys = frozenset({other.public_key().public_bytes_raw().hex()})
    assert verify_copy(io.BytesIO(copy(again)), keys, earlier)[0].count == 6
    again.close()


def test_entries_that_were_taken_back_are_noticed(tmp_path: Path) -> None:
    log = filled(tmp_path / "log")
    later = Head.from_signed(log.head(), KEYS)
    log.close()
    lines = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    (tmp_path / "log").write_bytes(b"".join(lines[:3]))
    again = AuditLog(tmp_path / "log", KEY)
    with pytest.raises(IntegrityError, match="taken back"):
        verify_copy(io.BytesIO(copy(again)), KEYS, later)
    for number in range(4):  # as long again, and another log
        again.append("one", "event", {"number": number})
    with pytest.raises(IntegrityError, match="taken back"):
        verify_copy(io.BytesIO(copy(again)), KEYS, later)
    again.close()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 600), st.sampled_from([0, 0, 1, 256]))
def test_the_end_of_a_log_verifies_behind_the_head_that_one_has(long_log: AuditLog, kept: int, further: int) -> None:
    """And behind no other: neither of another length, nor of another log."""
    log = long_log
    begins = Head(kept, chain_after(log.path, kept))
    end = io.BytesIO(b"".join(log.copy_for("one", kept + further)))
    if not further:
        assert verify_copy(end, KEYS, begins_at=begins)[0].count == 600
    else:
        with pytest.raises(IntegrityError):
            verify_copy(end, KEYS, begins_at=begins)
    with pytest.raises(IntegrityError):
        verify_copy(io.BytesIO(b"".join(log.copy_for("one", kept))), KEYS, begins_at=Head(kept, bytes(31) + b"x"))


def test_a_torn_last_line_is_cut_off_and_told(tmp_path: Path) -> None:
    filled(tmp_path / "log").close()
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole + b'{"chain":"ab')
    log = AuditLog(tmp_path / "log", KEY)
    assert log.repaired == 12
    assert verify_copy(io.BytesIO(copy(log)), KEYS)[0].count == 6
    assert b'"log-repaired"' in copy(log)
    log.close()


def test_a_head_speaks_of_entries_on_disk_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A party holds the service to it: what a power failure could take back must not be told."""
    log = filled(tmp_path / "log")
    writing, go_on = threading.Event(), threading.Event()
    on_disk = [5]

    def slow(_: int) -> None:
        reached = log.count
        writing.set()
        assert go_on.wait(10)
        on_disk[0] = reached

    monkeypatch.setattr(module, "sync", slow)
    appending = threading.Thread(target=log.append, args=("one", "event"))
    appending.start()
    assert writing.wait(10)
    told: list[tuple[int, int]] = []
    asking = threading.Thread(target=lambda: told.append((Head.from_signed(log.head(), KEYS).count, on_disk[0])))
    asking.start()
    asking.join(0.2)
    go_on.set()
    asking.join(10)
    appending.join(10)
    assert told == [(6, 6)]
    log.close()


def test_a_disk_that_refused_once_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled(tmp_path / "log")

    def refuse(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched, pytest.raises(StorageError, match="records nothing more"):
        patched.setattr(module, "sync", refuse)
        log.append("one", "event")
    with pytest.raises(StorageError, match="records nothing more"):
        log.head()
    log.close()


def test_a_changed_line_stops_the_service(tmp_path: Path) -> None:
    filled(tmp_path / "log").close()
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole.replace(b'"number":1', b'"number":7'))
    with pytest.raises(IntegrityError, match="line 2"):
        AuditLog(tmp_path / "log", KEY)


def test_two_services_do_not_write_one_log(tmp_path: Path) -> None:
    log = filled(tmp_path / "log")
    with pytest.raises(ConfigError, match="another service"):
        AuditLog(tmp_path / "log", KEY)
    log.close()
    with pytest.raises(StorageError, match="closed"):
        log.append("one", "event")


def test_threads_share_it(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", KEY)
    threads = [
        threading.Thread(target=lambda: [log.append("one", "event", {"n": n}) for n in range(20)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify_copy(io.BytesIO(copy(log)), KEYS)[0].count == 160
    log.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_byte_of_a_copy_can_be_changed(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "log"
    if not path.exists():
        filled(path, 3).close()
    log = AuditLog(path, KEY)
    made = copy(log, "one")
    log.close()
    at = data.draw(st.integers(0, len(made) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda it: it != made[at]))
    changed = made[:at] + bytes([byte]) + made[at + 1 :]
    try:
        head, _ = verify_copy(io.BytesIO(changed), KEYS)
    except IntegrityError:
        return
    # White space between JSON's tokens is not signed; what was said is.
    assert head.count == 3
    assert [json.loads(line) for line in changed.splitlines()] == [json.loads(line) for line in made.splitlines()]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_whatever_comes_is_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError):
        verify_copy(io.BytesIO(content), KEYS)
