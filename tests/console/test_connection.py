"""What an owner's first page shows once his enclave does not stand any more: nothing green, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from obfuscatune.attest.checks import Check
from obfuscatune.channel.audit_chain import verify_copy
from obfuscatune.channel.client import Attested
from obfuscatune.channel.identity import Identity
from obfuscatune.client.heads import HeadFile
from obfuscatune.console.connection import Found, OwnerConnection
from obfuscatune.console.owner import owner_console
from obfuscatune.service.audit_log import AuditLog
from tests.channel.parties import Enclave
from tests.client.conftest import served, server_context
from tests.console.conftest import ATTACK, Handler, Served, serve
from tests.console.test_escape import harmless

SIGNING_KEY = Ed25519PrivateKey.generate()


class LoggingEnclave(Handler):
    """An enclave with an audit log that is real, and that its disk's owner can set back."""

    serving: ExitStack
    spoil: Callable[[bytes], bytes] = staticmethod(lambda copy: copy)

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "log"
        self.log = AuditLog(self.path, SIGNING_KEY)
        for _ in range(5):
            self.log.append("one", "event")

    def status(self, *it: Any) -> dict[str, Any]:
        return {**super().status(*it), "head": self.log.head()}

    def set_back(self, lines: int) -> None:
        self.log.close()
        self.path.write_bytes(b"".join(self.path.read_bytes().splitlines(keepends=True)[:lines]))
        self.log = AuditLog(self.path, SIGNING_KEY)

    def app(self) -> Starlette:
        def audit_log(request: Any) -> StreamingResponse:
            since = int(request.query_params.get("since", 0))
            whose = self.came[0][1] if self.came else "one"
            return StreamingResponse(iter([self.spoil(b"".join(self.log.copy_for(whose, since)))]))

        def models(_: Any) -> JSONResponse:
            return JSONResponse({"models": []})

        return Starlette(
            routes=[Route("/obfuscatune/v1/audit-log", audit_log), Route("/obfuscatune/v1/status", models)]
        )


@pytest.fixture
def followed(tmp_path: Path) -> Iterator[tuple[Served, LoggingEnclave]]:
    """A console that keeps the heads of its enclave's log."""
    with ExitStack() as stack:
        owner, http_identity, handler = Identity.generate("owner"), Identity.generate("api"), LoggingEnclave(tmp_path)
        stack.callback(lambda: handler.log.close())
        handler.serving = stack.enter_context(ExitStack())
        port = handler.serving.enter_context(served(handler.app(), server_context(http_identity, owner)))
        handler.api = f"127.0.0.1:{port}"
        signer = SIGNING_KEY.public_key().public_bytes_raw().hex()
        enclave = Enclave(http_key=http_identity.fingerprint, signing_key=signer)
        enclave.handler = handler  # type: ignore[assignment]
        server = enclave.server()
        server.start()
        stack.callback(server.stop)
        heads, told = HeadFile(tmp_path / "heads", "enclave.example:7700"), []

        def connect() -> Attested:
            return Attested.connect(server.address, owner, enclave.policy())

        connection = OwnerConnection(connect, server.address, owner, heads=heads, tell=told.append)
        yield serve(stack, owner_console(connection, told.append), told, connection), handler


def test_a_log_that_was_set_back_ends_it_and_nothing_stays_green(followed: tuple[Served, LoggingEnclave]) -> None:
    console, enclave = followed
    assert console.connection.supervisor.check()
    assert console.browser.get("/jobs/new").status_code != 503
    enclave.log.append("one", "event")
    assert console.connection.supervisor.look()
    enclave.set_back(3)
    assert not console.connection.supervisor.look()
    page = console.browser.get("/").text
    assert "does not go on from the 6 entries that were seen of it" in page
    assert "It held, and counts no more" in page
    assert "badge past" in page and "badge holds" not in page
    assert console.browser.get("/jobs").status_code == 503
    assert not console.connection.supervisor.check()  # a new session does not mend it


def test_a_log_that_was_set_back_before_the_console_began_releases_no_key(
    followed: tuple[Served, LoggingEnclave],
) -> None:
    console, enclave = followed
    assert console.connection.supervisor.check()
    enclave.set_back(3)
    enclave.came.clear()
    assert not console.connection.supervisor.check()
    assert not [it for it in enclave.came if it[0] == "owner-key"]


def test_what_has_ended_is_not_green_any_more(owner_served: Served) -> None:
    """Real evidence, as far as a page can tell: the same checks are green while they count, and not after."""
    connection = owner_served.connection
    checks = tuple(Check(name, True, "this", "this") for name in ("policy", "kind.tdx", "tdx.signature", "freshness"))
    kept = connection._found, connection.supervisor._standing
    record = connection.found.record

    class Tdx:
        simulated = False

        def __getattr__(self, name: str) -> Any:
            return getattr(record, name)

    Tdx.checks = checks  # type: ignore[attr-defined]
    try:
        connection._found = Found(Tdx(), (), "ab" * 32)  # type: ignore[arg-type]
        assert "badge holds" in owner_served.browser.get("/").text
        connection.supervisor._standing = None
        page = owner_served.browser.get("/").text
        assert "badge holds" not in page and "badge past" in page
        assert "Every check holds" not in page
    finally:
        connection._found, connection.supervisor._standing = kept


def test_what_was_never_verified_is_not_known(owner_served: Served) -> None:
    connection = owner_served.connection
    kept = connection._found, connection.supervisor._standing
    try:
        connection._found, connection.supervisor._standing = Found(None), None
        page = owner_served.browser.get("/")
        assert "Not known" in page.text and not re.search(r"badge (holds|verified|past)", page.text)
        assert owner_served.browser.get("/verification.json").status_code == 404
    finally:
        connection._found, connection.supervisor._standing = kept


@pytest.mark.parametrize("path", ["/", "/jobs"])
def test_a_service_that_goes_away_is_verified_anew_soon(followed: tuple[Served, LoggingEnclave], path: str) -> None:
    console, enclave = followed
    supervisor = console.connection.supervisor
    assert supervisor.check()
    enclave.serving.close()
    page = console.browser.get(path)
    assert page.status_code == (200 if path == "/" else 502)
    assert supervisor._wanted.is_set()


def test_the_log_is_shown_once_it_verified(followed: tuple[Served, LoggingEnclave]) -> None:
    console, enclave = followed
    assert console.connection.supervisor.check()
    own = console.connection.identity.fingerprint
    enclave.log.append(own, "adapter-exported", {"job": "ftjob-1", "sha256": {"a": "b"}})
    enclave.log.append(own, ATTACK, {ATTACK[:40]: ATTACK})
    enclave.log.append("another", "file-created", {"file": "file-of-another"})
    page = console.browser.get("/log")
    assert page.status_code == 200
    shown = harmless(console, page.text)
    for told in ("The log holds: 8 entries", "Adapter handed out", "Left the enclave", "ftjob-1", ATTACK[:80]):
        assert told in shown
    assert "file-of-another" not in shown
    (tmp := enclave.path.with_name("copy")).write_bytes(console.browser.get("/log.jsonl").content)
    with tmp.open("rb") as file:
        head, clear = verify_copy(file, frozenset({SIGNING_KEY.public_key().public_bytes_raw().hex()}))
    assert (head.count, clear) == (8, 2)


def test_a_log_that_does_not_hold_is_not_shown(followed: tuple[Served, LoggingEnclave]) -> None:
    console, enclave = followed
    assert console.connection.supervisor.check()
    own = console.connection.identity.fingerprint
    enclave.log.append(own, "file-created", {"file": "file-1"})
    enclave.spoil = lambda copy: copy.replace(b"file-1", b"file-2")
    page = console.browser.get("/log")
    assert page.status_code == 502
    assert "The log does not hold" in page.text and "the chain breaks at line 6" in page.text
    assert "file-2" not in page.text
    enclave.spoil = lambda copy: b""
    assert "its end was cut off" in console.browser.get("/log").text


def test_a_log_is_read_up_to_a_length(followed: tuple[Served, LoggingEnclave], monkeypatch: pytest.MonkeyPatch) -> None:
    console, _ = followed
    assert console.connection.supervisor.check()
    monkeypatch.setattr("obfuscatune.console.owner_log.MOST_BYTES", 300)
    page = console.browser.get("/log")
    assert page.status_code == 502 and "more than 300 bytes" in page.text
