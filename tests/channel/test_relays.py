"""Adversaries on the way: each has real sockets and TLS, and relays genuine evidence. Nothing is released to any."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from OpenSSL import SSL

from obfuscatune.attest.binding import Binding
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.verification import verify
from obfuscatune.channel.client import Attested
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.messages import Hello, MessageType, pack, parse_body
from obfuscatune.channel.session import Session
from obfuscatune.errors import ChannelError, ConnectionLost, EvidenceError, UntrustedPeer, VerificationFailed
from obfuscatune.protocol.sockets import Deadline
from tests.channel.parties import (
    KEY,
    SOON,
    Adversary,
    Enclave,
    Relay,
    evidence_message,
    forwarded,
    open_session,
)

CLIENT = Identity.generate("owner")
STRANGER = Identity.generate("stranger")


def failed(error: pytest.ExceptionInfo[VerificationFailed]) -> list[str]:
    return [check.name for check in error.value.checks if not check.passed]


def test_a_network_that_forwards_bytes_changes_nothing() -> None:
    enclave = Enclave()
    with enclave.server() as server, forwarded(server.address) as address:
        with Attested.connect(address, CLIENT, enclave.policy()) as channel:
            channel.release("owner-key", {}, KEY)
        assert channel.verified.claims == enclave.claims
    assert enclave.handler.came == [("owner-key", CLIENT.fingerprint, CLIENT.certificate_pem, KEY)]


@pytest.mark.parametrize("stolen", ["nothing", "the enclave's TLS key", "both TLS keys"])
def test_relayed_evidence_is_refused(stolen: str) -> None:
    enclave = Enclave()
    shown = STRANGER if stolen == "nothing" else enclave.identity
    towards_enclave = CLIENT if stolen == "both TLS keys" else STRANGER
    with enclave.server() as server:
        relay = Relay(server.address, towards_enclave)
        with Adversary(shown, relay) as adversary, pytest.raises(VerificationFailed) as error:
            Attested.connect(adversary.address, CLIENT, enclave.policy())
    assert failed(error) == ["simulated.report_data"]
    assert len(relay.passed) == 2, "HELLO and EVIDENCE passed, and nothing after them"
    assert enclave.handler.came == []


def test_the_relayed_evidence_is_genuine() -> None:
    """What the adversary relays would be accepted by whoever bound it to the nonce alone."""
    enclave = Enclave()
    with enclave.server() as server:
        session = open_session(server.address, STRANGER)
        nonce = bytes(32)
        session.send(Hello("enclave", nonce).pack(), Deadline(SOON))
        body = parse_body(session.receive(MessageType.EVIDENCE, Deadline(SOON)), frozenset({"claims", "evidence"}))
        exporter = session._tls.export_keying_material(b"EXPERIMENTAL obfuscatune attest v1", 32, nonce)
        own = Binding(exporter, session.peer_key, bytes.fromhex(STRANGER.fingerprint), nonce).report_data(
            enclave.claims
        )
        session.end()
    evidence = Evidence.from_document(body["evidence"])
    assert verify(evidence, enclave.policy(), report_data=own, claims=enclave.claims, nonce=nonce, now=0)


def test_replayed_evidence_is_refused() -> None:
    enclave = Enclave()
    with enclave.server() as server:
        relay = Relay(server.address, CLIENT)
        with Adversary(enclave.identity, relay) as adversary, pytest.raises(VerificationFailed):
            Attested.connect(adversary.address, CLIENT, enclave.policy())
    recorded = relay.passed[1]

    def replay(client: Session) -> None:
        client.receive(MessageType.HELLO, Deadline(SOON))
        client.send(recorded, Deadline(SOON))

    with Adversary(enclave.identity, replay) as adversary, pytest.raises(VerificationFailed) as error:
        Attested.connect(adversary.address, CLIENT, enclave.policy())
    assert failed(error) == ["simulated.report_data"]


def test_claims_beside_the_evidence_cannot_be_changed() -> None:
    """The adversary is on the enclave's machine, has its TLS key, and wants the secret sealed to a key of its own."""
    enclave = Enclave()
    own = dataclasses.replace(
        enclave.claims, hpke_key=X25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    )

    def swap(client: Session) -> None:
        hello = Hello.parse(client.receive(MessageType.HELLO, Deadline(SOON)))
        attester = bytes.fromhex(enclave.identity.fingerprint)
        binding = Binding(client.exporter(hello.nonce), attester, client.peer_key, hello.nonce)
        evidence = enclave.platform.attest(binding.report_data(enclave.claims))
        client.send(evidence_message(own, evidence), Deadline(SOON))

    with Adversary(enclave.identity, swap) as adversary, pytest.raises(VerificationFailed) as error:
        Attested.connect(adversary.address, CLIENT, enclave.policy())
    assert failed(error) == ["simulated.report_data"]


@pytest.mark.parametrize("role", ["worker", "owner", "enclave"])
def test_evidence_of_another_role_is_refused(role: str) -> None:
    """Another program on the same platform, whose evidence is bound to this very session."""
    enclave = Enclave()

    def attest(client: Session) -> None:
        hello = Hello.parse(client.receive(MessageType.HELLO, Deadline(SOON)))
        attester = bytes.fromhex(enclave.identity.fingerprint)
        fields = (
            b"obfuscatune/attest/v1",
            role.encode(),
            client.exporter(hello.nonce),
            attester,
            client.peer_key,
            hello.nonce,
            enclave.claims.digest,
        )
        joined = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
        evidence = enclave.platform.attest(hashlib.sha512(joined).digest())
        client.send(evidence_message(enclave.claims, evidence), Deadline(SOON))

    with Adversary(enclave.identity, attest) as adversary:
        if role == "enclave":  # the control: so far the adversary is an enclave
            Attested.connect(adversary.address, CLIENT, enclave.policy()).close()
            return
        with pytest.raises(VerificationFailed) as error:
            Attested.connect(adversary.address, CLIENT, enclave.policy())
    assert failed(error) == ["simulated.report_data"]


def test_claims_of_another_role_are_refused() -> None:
    enclave = Enclave()

    def answer(client: Session) -> None:
        client.receive(MessageType.HELLO, Deadline(SOON))
        claims = {**enclave.claims.to_document(), "role": "worker"}
        evidence = enclave.platform.attest(bytes(64)).to_document()
        client.send(pack(MessageType.EVIDENCE, {"claims": claims, "evidence": evidence}), Deadline(SOON))

    with Adversary(enclave.identity, answer) as adversary, pytest.raises(EvidenceError, match="role"):
        Attested.connect(adversary.address, CLIENT, enclave.policy())


def test_bytes_that_somebody_adds_to_a_session_end_it_for_good() -> None:
    enclave = Enclave()
    with enclave.server() as server, forwarded(server.address) as address:
        channel = Attested.connect(address, CLIENT, enclave.policy())
        channel._session._sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))  # a record that nobody encrypted
        with pytest.raises((ChannelError, ConnectionLost)):
            channel.request("status", {})
        with pytest.raises(ChannelError, match="over"):
            channel.request("status", {})
    assert enclave.handler.came == []


def test_another_enclave_than_the_pinned_one_is_refused_before_anything_is_sent() -> None:
    enclave = Enclave()
    with enclave.server() as server:
        with Attested.connect(server.address, CLIENT, enclave.policy(), pinned={enclave.identity.fingerprint}):
            pass
        with pytest.raises(UntrustedPeer, match=enclave.identity.fingerprint):
            Attested.connect(server.address, CLIENT, enclave.policy(), pinned={STRANGER.fingerprint})


@pytest.mark.parametrize("later", [60, -1])
def test_what_was_verified_expires(later: int) -> None:
    enclave = Enclave()
    clock = iter([1000, 1059, 1000 + later, 1001])
    with enclave.server() as server:
        channel = Attested.connect(
            server.address, CLIENT, enclave.policy(freshness_seconds=60), clock=lambda: float(next(clock))
        )
        channel.release("owner-key", {}, KEY)
        with pytest.raises(VerificationFailed, match="expired"):
            channel.release("owner-key", {}, KEY)
        with pytest.raises(ChannelError, match="over"):
            channel.release("owner-key", {}, KEY)
    assert len(enclave.handler.came) == 1


def test_no_older_tls_with_the_enclave() -> None:
    enclave = Enclave()
    context = old_tls(CLIENT)
    context.set_alpn_protos([b"obfuscatune-attested/1"])
    with enclave.server() as server, pytest.raises(ChannelError, match="version"):
        open_session(server.address, CLIENT, context)


def test_no_older_tls_with_who_says_that_it_is_one() -> None:
    enclave = Enclave()
    adversary = Adversary(enclave.identity, lambda client: None)
    adversary._context = old_tls(enclave.identity)
    with adversary, pytest.raises(ChannelError, match="version"):
        Attested.connect(adversary.address, CLIENT, enclave.policy())


def old_tls(identity: Identity) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    context.use_certificate(identity.certificate)
    context.use_privatekey(identity.key)
    context.set_verify(SSL.VERIFY_PEER, lambda *_: True)
    return context
