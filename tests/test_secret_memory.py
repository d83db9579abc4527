"""Secrets in pages of their own: locked, left out of dumps, empty in a fork, zeroed; and never shown by accident."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from obfuscatune.secret_memory import SecretBytes, secret_view

CANARY = b"a secret of thirty-two bytes ..!"


def run(code: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_it_holds_what_it_was_given_and_shows_it_only_when_asked() -> None:
    secret = SecretBytes(CANARY)
    assert secret.view == CANARY == secret_view(secret) == secret_view(CANARY)
    assert len(secret) == 32
    assert secret.view.readonly
    for shown in repr(secret), str(secret), f"{secret}", repr([secret]), repr({"key": secret}):
        assert "thirty" not in shown
        assert "redacted" in shown


def test_no_pickle_no_copy_no_hash_no_bytes() -> None:
    secret = SecretBytes(CANARY)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy, hash, bytes, iter, json.dumps):
        with pytest.raises(TypeError):
            attempt(secret)  # type: ignore[arg-type]


def test_a_traceback_with_locals_does_not_show_it() -> None:
    secret = SecretBytes(CANARY)
    try:
        raise ValueError(f"of {secret}")
    except ValueError as error:
        shown = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert "redacted" in shown
    assert "thirty-two bytes ..!" not in shown.replace(repr(CANARY), "")


def test_it_is_zeroed_when_it_is_closed_even_while_somebody_looks() -> None:
    secret = SecretBytes(CANARY)
    view = secret.view
    secret.close()
    assert bytes(view) == bytes(32)
    for look in (lambda: secret.view, secret.writable):
        with pytest.raises(ValueError, match="closed"):
            look()
    secret.close()
    with SecretBytes(CANARY) as within:
        pass
    with pytest.raises(ValueError, match="closed"):
        _ = within.view
    forgotten = SecretBytes(CANARY)
    view = forgotten.view
    del forgotten
    assert bytes(view) == bytes(32)


def test_secrets_are_equal_by_contents_and_random_ones_differ() -> None:
    assert SecretBytes(CANARY) == SecretBytes(bytearray(CANARY))
    assert SecretBytes(CANARY) != SecretBytes(CANARY[:-1])
    assert SecretBytes(CANARY) != CANARY
    one, two = SecretBytes.random(64), SecretBytes.random(64)
    assert one != two
    assert len(set(one.view)) > 16
    with pytest.raises(ValueError, match="at least one byte"):
        SecretBytes(b"")


def test_its_pages_are_locked_left_out_of_dumps_and_empty_in_a_fork() -> None:
    if sys.platform != "linux":
        pytest.skip("the system shows it on Linux alone")
    secret = SecretBytes(CANARY)
    import ctypes

    address = ctypes.addressof(ctypes.c_char.from_buffer(secret._pages))
    flags = _flags_of_region(address)
    assert {"dd", "wf"} <= set(flags)  # do not dump, wipe on fork
    assert ("lo" in flags) == secret.is_locked
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            found = b"".join([secret._pages[:32], b"|"])
            try:
                secret.view  # noqa: B018
            except ValueError as error:
                found += str(error).encode()
            os.write(writing, found)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == bytes(32) + b"|this secret is another process's"
    assert secret.view == CANARY


def _flags_of_region(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address."""
    holds = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if region := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            holds = int(region[1], 16) <= address < int(region[2], 16)
        elif holds and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError("no such mapping")


def test_dumps_are_forbidden_and_what_is_missing_is_said() -> None:
    if sys.platform != "linux":
        pytest.skip("PR_SET_DUMPABLE is Linux's")
    found = run(
        "import ctypes, json, resource\n"
        "from obfuscatune.secret_memory import forbid_dumps\n"
        "missing = forbid_dumps()\n"
        "print(json.dumps({'core': resource.getrlimit(resource.RLIMIT_CORE), 'missing': missing,"
        " 'dumpable': ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)}))"
    )
    assert found == {"core": [0, 0], "dumpable": 0, "missing": []}


def test_without_lockable_memory_it_works_and_says_so() -> None:
    found = run(
        "import json, os, resource\n"
        "from obfuscatune.secret_memory import SecretBytes, forbid_dumps\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        "if os.geteuid() == 0:\n"
        "    os.setuid(65534)\n"
        "secret = SecretBytes(b'abc')\n"
        "print(json.dumps({'locked': secret.is_locked, 'holds': bytes(secret.view).decode(),"
        " 'missing': forbid_dumps()}))"
    )
    assert (found["locked"], found["holds"]) == (False, "abc")
    assert "RLIMIT_MEMLOCK" in str(found["missing"])
