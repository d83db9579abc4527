"""The enclave's end against hostile clients: what is not of the protocol ends the session, and costs little."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL

from obfuscatune import documents
from obfuscatune.attest.binding import Binding
from obfuscatune.attest.claims import Claims
from obfuscatune.attest.evidence import Evidence
from obfuscatune.channel.client import Attested
from obfuscatune.channel.grants import Consent, Revocation
from obfuscatune.channel.hpke import release_info, seal
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.messages import (
    HEADER_BYTES,
    MOST_REQUESTS,
    Hello,
    MessageType,
    Reply,
    Request,
    parse_body,
    parse_error,
)
from obfuscatune.channel.server import ChannelServer, ServerLimits
from obfuscatune.channel.session import Session, tls_context
from obfuscatune.errors import (
    ChannelError,
    ConfigError,
    ConnectionLost,
    EvidenceError,
    IntegrityError,
    StorageError,
    TermsError,
    WireError,
)
from obfuscatune.protocol.addresses import TcpAddress
from obfuscatune.protocol.sockets import Deadline
from tests.channel.parties import DIGEST, HERE, KEY, SOON, Adversary, Enclave, grant, open_session, read_message

CLIENT = Identity.generate("provider")
HELLO = Hello("enclave", bytes(32)).pack()


@pytest.fixture(scope="module")
def enclave() -> Enclave:
    return Enclave()


@pytest.fixture(scope="module")
def server(enclave: Enclave) -> Iterator[ChannelServer]:
    with enclave.server() as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_came(enclave: Enclave) -> None:
    enclave.handler.came.clear()
    enclave.handler.raises = None


def said_hello(server: ChannelServer, enclave: Enclave, identity: Identity = CLIENT) -> tuple[Session, bytes]:
    """A session whose evidence came, and its report data."""
    session = open_session(server.address, identity)
    session.send(HELLO, Deadline(SOON))
    body = parse_body(session.receive(MessageType.EVIDENCE, Deadline(SOON)), frozenset({"claims", "evidence"}))
    assert Claims.from_document(body["claims"]) == enclave.claims and Evidence.from_document(body["evidence"])
    binding = Binding(session.exporter(bytes(32)), session.peer_key, bytes.fromhex(identity.fingerprint), bytes(32))
    return session, binding.report_data(enclave.claims)


def ended(session: Session) -> str:
    """Why the enclave ended the session: the code of its ERROR, or nothing."""
    try:
        message = read_message(session)
        return parse_error(message[HEADER_BYTES:])[0] if message[5] == MessageType.ERROR else f"type {message[5]}"
    except ConnectionLost:
        return ""
    finally:
        session.close()


def sealed(enclave: Enclave, report_data: bytes, kind: str, sequence: int, document: dict[str, Any]) -> bytes:
    info = release_info(kind, report_data, sequence, documents.canonical(document))
    return seal(KEY, bytes.fromhex(enclave.claims.hpke_key), info)


def test_each_request_reaches_the_service_with_who_sent_it(server: ChannelServer, enclave: Enclave) -> None:
    with Attested.connect(server.address, CLIENT, enclave.policy()) as channel:
        assert channel.release("grant", grant().sign(CLIENT), KEY) == {"count": 1}
        channel.release("owner-key", {}, KEY)
        channel.request("revoke", Revocation("llama", DIGEST, 2).sign(CLIENT))
        channel.request("consent", Consent("llama", DIGEST, DIGEST, "ft:llama:1").sign(CLIENT))
        channel.request("status", {})
    came = enclave.handler.came
    assert [it[:2] for it in came] == [
        (kind, CLIENT.fingerprint) for kind in ("grant", "owner-key", "revoke", "consent", "status")
    ]
    assert came[0][2].model == "llama" and came[0][2].provider == CLIENT.key.public_key().public_bytes_raw().hex()
    assert came[0][3] == KEY and came[1][2:] == (CLIENT.certificate_pem, KEY)


@pytest.mark.parametrize("kind", ["grant", "revoke", "consent"])
def test_what_another_signed_is_refused_and_the_session_goes_on(
    server: ChannelServer, enclave: Enclave, kind: str
) -> None:
    stranger = Identity.generate("stranger")
    signed = {
        "grant": grant().sign(stranger),
        "revoke": Revocation("llama", DIGEST, 2).sign(stranger),
        "consent": Consent("llama", DIGEST, DIGEST, "ft:llama:1").sign(stranger),
    }[kind]
    with Attested.connect(server.address, CLIENT, enclave.policy()) as channel:
        with pytest.raises(IntegrityError, match="signed by the key that it is sent with"):
            channel._ask(kind, signed, KEY if kind == "grant" else None, SOON)
        assert enclave.handler.came == []
        assert channel.request("status", {}) == {"count": 1}


@pytest.mark.parametrize(
    ("raised", "seen", "text"),
    [
        (TermsError("until: over"), TermsError, "until: over"),
        (IntegrityError("another manifest"), IntegrityError, "another manifest"),
        (StorageError("disk\n\x1b[31mfull"), ChannelError, r"disk \?\[31mfull"),
        (ValueError("the key was 00112233"), ChannelError, "a fault of the enclave's$"),
    ],
)
def test_what_the_service_raises(
    server: ChannelServer, enclave: Enclave, raised: Exception, seen: type[Exception], text: str
) -> None:
    with Attested.connect(server.address, CLIENT, enclave.policy()) as channel:
        enclave.handler.raises = raised
        with pytest.raises(seen, match=text):
            channel.request("status", {})
        enclave.handler.raises = None
        channel.request("status", {})


REPLAYS = ["another session", "another client", "again", "another kind", "another document"]


@pytest.mark.parametrize("where", ["here", *REPLAYS])
def test_a_sealed_secret_opens_where_it_was_sealed_for_alone(
    server: ChannelServer, enclave: Enclave, where: str
) -> None:
    document: dict[str, Any] = grant().sign(CLIENT)
    session, report_data = said_hello(server, enclave)
    secret = sealed(enclave, report_data, "grant", 1, document)
    kind, sequence = "grant", 1
    if where in ("another session", "another client"):
        session.close()
        session, _ = said_hello(server, enclave, CLIENT if where == "another session" else Identity.generate("other"))
    elif where == "again":
        session.send(Request(1, "grant", document, secret).pack(), Deadline(SOON))
        assert Reply.parse(session.receive(MessageType.REPLY, Deadline(SOON)), 1).result
        enclave.handler.came.clear()
        sequence = 2
    elif where == "another kind":
        kind, document = "owner-key", {}
    elif where == "another document":
        document = grant(export="allowed").sign(CLIENT)
    session.send(Request(sequence, kind, document, secret).pack(), Deadline(SOON))
    if where == "here":
        assert ended(session) == "type 4" and len(enclave.handler.came) == 1
    else:
        assert ended(session) == "malformed" and enclave.handler.came == []


def test_a_request_before_its_turn_ends_the_session(server: ChannelServer, enclave: Enclave) -> None:
    request = Request(1, "status", {}, None).pack()
    session = open_session(server.address, CLIENT)
    session.send(request, Deadline(SOON))
    assert ended(session) == "malformed"
    for second in (HELLO, Request(2, "status", {}, None).pack(), Request(0, "status", {}, None).pack()):
        session, _ = said_hello(server, enclave)
        session.send(second, Deadline(SOON))
        assert ended(session) == "malformed"
    assert enclave.handler.came == []


def test_what_comes_with_no_document_comes_with_an_empty_one(server: ChannelServer, enclave: Enclave) -> None:
    with Attested.connect(server.address, CLIENT, enclave.policy()) as channel:
        for kind, key in (("owner-key", KEY), ("status", None)):
            with pytest.raises(IntegrityError, match="an empty document"):
                channel._ask(kind, {"more": 1}, key, SOON)
    assert enclave.handler.came == []


def test_evidence_of_another_role_is_not_asked_of_the_enclave(server: ChannelServer, enclave: Enclave) -> None:
    session = open_session(server.address, CLIENT)
    session.send(Hello("worker", bytes(32)).pack(), Deadline(SOON))
    assert ended(session) == "malformed"


def test_a_session_has_so_many_requests(server: ChannelServer, enclave: Enclave) -> None:
    session, _ = said_hello(server, enclave)
    for number in range(1, MOST_REQUESTS + 1):
        session.send(Request(number, "status", {}, None).pack(), Deadline(SOON))
        session.receive(MessageType.REPLY, Deadline(SOON))
    assert ended(session) == "malformed"


def test_who_has_no_certificate_or_speaks_another_protocol_is_refused(server: ChannelServer, enclave: Enclave) -> None:
    for certificate, protocols in ((False, [b"obfuscatune-attested/1"]), (True, [b"h2"]), (True, [])):
        context = SSL.Context(SSL.TLS_METHOD)
        if certificate:
            context.use_certificate(CLIENT.certificate)
            context.use_privatekey(CLIENT.key)
        if protocols:
            context.set_alpn_protos(protocols)
        sock = socket.create_connection((server.address.host, server.address.port), timeout=SOON)
        session = Session(sock, context, server=False)
        session._wait(session._tls.do_handshake, (), Deadline(SOON))  # ours is over before the server judges
        with pytest.raises(WireError):
            session.send(HELLO, Deadline(SOON))
            read_message(session)
        session.close()


def test_a_session_is_not_resumed(server: ChannelServer, enclave: Enclave) -> None:
    context = tls_context(CLIENT, server=False)
    session = open_session(server.address, CLIENT, context)
    session.send(HELLO, Deadline(SOON))
    read_message(session)
    ticket = session._tls.get_session()
    session.end()
    sock = socket.create_connection((server.address.host, server.address.port), timeout=SOON)
    again = Session(sock, context, server=False)
    if ticket is not None:
        again._tls.set_session(ticket)
    again.handshake(Deadline(SOON))
    assert not SSL._lib.SSL_session_reused(again._tls._ssl)
    again.end()


def test_connections_are_bounded(enclave: Enclave) -> None:
    with enclave.server(ServerLimits(connections=2, step_s=60.0)) as server:
        first, _ = said_hello(server, enclave)
        second = socket.create_connection((server.address.host, server.address.port), timeout=SOON)
        third = socket.create_connection((server.address.host, server.address.port), timeout=SOON)
        assert third.recv(1) == b"", "one more than two is closed"
        first.send(Request(1, "status", {}, None).pack(), Deadline(SOON))
        assert first.receive(MessageType.REPLY, Deadline(SOON))
        for sock in (first, second, third):
            sock.close()


def test_each_step_has_its_time(enclave: Enclave) -> None:
    with enclave.server(ServerLimits(step_s=0.5, idle_s=0.5)) as server:
        silent = socket.create_connection((server.address.host, server.address.port), timeout=SOON)
        session = open_session(server.address, CLIENT)
        idle, _ = said_hello(server, enclave)
        slow, _ = said_hello(server, enclave)
        slow.send(b"OBAC", Deadline(SOON))
        assert [ended(it) for it in (session, idle, slow)] == ["deadline"] * 3
        assert silent.recv(1) == b""
        silent.close()


def test_a_whole_session_is_bounded(enclave: Enclave) -> None:
    with enclave.server(ServerLimits(session_s=0.4)) as server:
        session, _ = said_hello(server, enclave)
        assert ended(session) == "deadline"


def test_no_evidence_no_session(enclave: Enclave) -> None:
    broken = Enclave()

    class Platform:
        def attest(self, report_data: bytes) -> Evidence:
            raise EvidenceError("/sys/kernel/config/tsm is not there")

    broken.platform = Platform()  # type: ignore[assignment]
    with broken.server() as server, pytest.raises(ChannelError, match=r"\(evidence\): the enclave's platform gives no"):
        Attested.connect(server.address, CLIENT, broken.policy())


def test_a_platform_that_breaks_ends_the_session_alone(enclave: Enclave) -> None:
    broken = Enclave()
    broken.platform = None  # type: ignore[assignment]
    with broken.server() as server:
        for _ in range(2):
            with pytest.raises(ChannelError, match=r"\(internal\)"):
                Attested.connect(server.address, CLIENT, broken.policy())


def test_stopping_ends_what_waits_and_finishes_what_is_answered() -> None:
    enclave = Enclave()
    asked, answer = threading.Event(), threading.Event()

    def status(peer: str) -> dict[str, Any]:
        asked.set()
        answer.wait(SOON)
        return {"answered": True}

    enclave.handler.status = status  # type: ignore[method-assign]
    server = enclave.server().start()
    idle, _ = said_hello(server, enclave)
    channel = Attested.connect(server.address, CLIENT, enclave.policy())
    replies: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: replies.append(channel.request("status", {})))
    asking.start()
    assert asked.wait(SOON)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    assert ended(idle) == "stopping"
    answer.set()
    for thread in (stopping, asking):
        thread.join(SOON)
        assert not thread.is_alive()
    assert replies == [{"answered": True}]
    with pytest.raises(ChannelError, match="stopping"):
        channel.request("status", {})
    with pytest.raises(ConnectionLost):
        Attested.connect(server.address, CLIENT, enclave.policy())
    server.stop()
    assert server.sessions == 0


def test_the_claims_have_to_name_the_key() -> None:
    enclave = Enclave()
    enclave.hpke_key = X25519PrivateKey.generate()
    with pytest.raises(ConfigError, match="another HPKE key"):
        enclave.server()


def test_an_address_that_is_taken(server: ChannelServer, enclave: Enclave) -> None:
    parts = enclave.identity, enclave.claims, enclave.platform, enclave.handler, enclave.hpke_key
    with pytest.raises(ConfigError, match="cannot listen"):
        ChannelServer(server.address, *parts)
    assert TcpAddress(HERE.host, 0) == HERE


frames = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda kind, length, body: b"OBAC\1" + bytes([kind, 0, 0]) + length.to_bytes(4, "big") + body,
        st.integers(0, 255),
        st.one_of(st.integers(0, 600), st.integers(0, 2**32 - 1)),
        st.binary(max_size=600),
    ),
    st.builds(
        lambda message, place, byte: message[:place] + bytes([byte]) + message[place + 1 :],
        st.sampled_from([HELLO, Request(1, "status", {}, None).pack(), Request(1, "owner-key", {}, bytes(80)).pack()]),
        st.integers(0, 80),
        st.integers(0, 255),
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.lists(frames, min_size=1, max_size=3))
def test_whatever_comes_ends_in_an_error_or_an_answer(
    server: ChannelServer, enclave: Enclave, late: bool, data: list[bytes]
) -> None:
    session = said_hello(server, enclave)[0] if late else open_session(server.address, CLIENT)
    try:
        for part in data:
            session.send(part, Deadline(SOON))
        with contextlib.suppress(OSError):  # the enclave may have closed already
            session._sock.shutdown(socket.SHUT_WR)
        while True:
            message = read_message(session)
            assert message[5] in (MessageType.EVIDENCE, MessageType.REPLY, MessageType.ERROR)
            if message[5] == MessageType.ERROR:
                assert parse_error(message[HEADER_BYTES:])[0] == "malformed"
    except WireError:  # an alert of TLS, or the end
        pass
    finally:
        session.close()
    assert all(it[0] == "status" for it in enclave.handler.came), "nothing was released"


def test_nothing_is_left_of_hostile_clients(server: ChannelServer, enclave: Enclave) -> None:
    """Threads and descriptors, after as many broken connections as the server allows, thrice over."""

    def quiet() -> tuple[int, int]:
        ends = Deadline(SOON)
        while server.sessions:
            ends.remaining()
            os.sched_yield()
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    def attack() -> None:
        for number in range(32):
            sock = socket.create_connection((server.address.host, server.address.port), timeout=SOON)
            sock.send((b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x40\x00\x01", HELLO, b"")[number % 4])
            sock.close()
            open_session(server.address, CLIENT).close()

    attack()
    before = quiet()
    attack()
    attack()
    assert quiet() == before
    with Attested.connect(server.address, CLIENT, enclave.policy()) as channel:
        channel.request("status", {})


def test_a_server_that_answers_otherwise_is_refused() -> None:
    """What a client reads is bounded and checked as well."""
    enclave = Enclave()
    for answer, text in (
        (b"OBAC\1\2\0\0\xff\xff\xff\xff", "4,294,967,295 bytes"),
        (b"OBAC\1\4\0\0\0\0\0\2{}", "expected ERROR or EVIDENCE"),
        (b"OBAC\1\2\0\0\0\0\0\2{}", "expected the fields claims, evidence"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "found b'HTTP'"),
    ):

        def act(client: Session, answer: bytes = answer) -> None:
            client.receive(MessageType.HELLO, Deadline(SOON))
            client.send(answer, Deadline(SOON))

        with Adversary(enclave.identity, act) as adversary, pytest.raises(ChannelError, match=text):
            Attested.connect(adversary.address, CLIENT, enclave.policy())


@pytest.mark.long
def test_memory_does_not_grow(server: ChannelServer, enclave: Enclave) -> None:
    """A thousand sessions, half of them broken, once the allocator has what it needs."""

    def resident_kib() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024

    def run(count: int) -> int:
        for number in range(count):
            with Attested.connect(server.address, CLIENT, enclave.policy()) as channel:
                channel.release("grant", grant().sign(CLIENT), KEY)
            session = open_session(server.address, CLIENT)
            session.send(HELLO[: number % len(HELLO)] + bytes(number % 700), Deadline(SOON))
            session.close()
            enclave.handler.came.clear()
        gc.collect()
        return resident_kib()

    before = run(200)
    assert run(500) - before < 1024
