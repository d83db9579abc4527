"""What providers said counts after a restart, as far as it counted before, and whatever the disk's owner puts back."""

from __future__ import annotations

import datetime
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import delete, insert, select, update

from obfuscatune.channel.grants import Consent, Grant, Revocation, Terms
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.registry import GrantRegistry
from obfuscatune.errors import IntegrityError, TermsError
from obfuscatune.secret_memory import SecretBytes
from obfuscatune.service.audit_log import AuditLog
from obfuscatune.service.provider_words import ProviderWords, log_details
from obfuscatune.service.state import State
from obfuscatune.service.tables import asked, consents, grants, revocations

NOW = datetime.datetime(2026, 11, 29, tzinfo=datetime.UTC)
OWNER, ADAPTER = "01" * 32, "ft:m:01010101:canary:" + "a" * 24
DIGEST, OTHER = "d1" * 32, "d2" * 32


class Enclave:
    """What a service does with a provider's words, without the rest of it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.provider, self.key = Identity.generate("provider"), SecretBytes(os.urandom(32))
        self.folder, self.url = folder, url
        self.start()

    def start(self) -> None:
        self.state = State(self.url)
        self.log = AuditLog(self.folder / "audit.jsonl", Ed25519PrivateKey.generate())
        self.words = ProviderWords(self.state, self.log)
        self.registry = self.words.registry()

    def stop(self) -> None:
        self.state.close()
        self.log.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def _read(self, word: Any) -> Any:
        return type(word).from_signed(word.sign(self.provider), self.provider.fingerprint)

    def grant(self, sequence: int, manifest: str = DIGEST, export: str = "provider-consent") -> None:
        until = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)
        terms = Terms((OWNER,), ("inference",), export, until)
        grant = self._read(Grant("m", manifest, "/b", terms, sequence, "ab" * 16))
        self.registry.grant(grant, NOW)
        found = self.words.granted(grant, self.key)
        self.log.append("p", "granted", log_details(grant))
        for consent in found:
            self.registry.consent(consent)
        for owner, adapter in self.words.asked_before(grant, self.key):
            self.registry.ask_consent("m", owner, adapter)
        self.granted = grant

    def ask(self, adapter: str) -> None:
        self.registry.ask_consent("m", OWNER, adapter)
        self.words.keep_asked(self.granted, self.key, self.registry.asked("m"))

    def revoke(self, sequence: int) -> None:
        revocation = self._read(Revocation("m", DIGEST, sequence))
        self.registry.revoke(revocation)
        self.words.revoked(revocation)
        self.log.append("p", "revoked", log_details(revocation))

    def consent(self, manifest: str = DIGEST, adapter: str = ADAPTER) -> None:
        consent = self._read(Consent("m", manifest, OWNER, adapter))
        if self.registry.check_consent(consent):
            self.words.consented(consent, self.key)
        self.registry.consent(consent)

    def may_leave(self) -> bool:
        try:
            self.registry.check_export("m", OWNER, ADAPTER, NOW)
        except TermsError:
            return False
        return True


@pytest.fixture
def enclave(tmp_path: Path, url: str) -> Iterator[Enclave]:
    made = Enclave(tmp_path, url)
    yield made
    with made.state.writing() as connection:  # one PostgreSQL serves all tests
        for table in (asked, consents, revocations, grants):
            connection.execute(delete(table))
    made.stop()


def test_a_consent_counts_again_with_the_next_grant_of_its_bundle(enclave: Enclave) -> None:
    enclave.grant(1)
    enclave.consent()
    enclave.consent()
    enclave.restart()
    with pytest.raises(TermsError, match="nothing is granted"):
        enclave.registry.check_export("m", OWNER, ADAPTER, NOW)
    enclave.grant(2)
    assert enclave.may_leave()
    assert enclave.registry.consents("m") == 1
    with enclave.state.reading() as connection:
        assert len(connection.execute(select(consents)).all()) == 1


def test_a_consent_is_sealed(tmp_path: Path) -> None:
    made = Enclave(tmp_path, f"sqlite:///{tmp_path / 'state.sqlite'}")
    made.grant(1)
    made.consent()
    made.stop()
    stored = b"".join(it.read_bytes() for it in tmp_path.iterdir())
    assert b"consent-" in stored
    assert b"canary" not in stored


def test_a_consent_of_another_bundle_does_not_count(enclave: Enclave) -> None:
    enclave.grant(1)
    enclave.consent()
    enclave.grant(2, manifest=OTHER)
    assert not enclave.may_leave()
    enclave.restart()
    enclave.grant(3)
    assert not enclave.may_leave()  # it was over with the grant of the other one


def test_terms_that_ask_for_no_consent_take_none(enclave: Enclave) -> None:
    enclave.grant(1)
    enclave.consent()
    enclave.restart()
    with pytest.raises(TermsError, match="never"):
        enclave.grant(2, export="never")
    enclave.grant(3)
    assert enclave.may_leave()


def test_a_revocation_outlives_a_restart(enclave: Enclave) -> None:
    enclave.grant(1)
    enclave.consent()
    enclave.revoke(5)
    enclave.restart()
    for old in (1, 4):
        with pytest.raises(TermsError, match="older than 5"):
            enclave.grant(old)
    with pytest.raises(TermsError, match="another document"):
        enclave.grant(5)
    enclave.grant(6)
    assert not enclave.may_leave()
    enclave.consent()
    enclave.restart()
    enclave.grant(7)
    assert enclave.may_leave()


@pytest.mark.parametrize("lost", ["database", "log"])
def test_either_of_database_and_log_is_enough(tmp_path: Path, lost: str) -> None:
    made = Enclave(tmp_path, f"sqlite:///{tmp_path / 'state.sqlite'}")
    made.grant(1)
    made.consent()
    made.revoke(5)
    made.stop()
    for path in tmp_path.glob("state.sqlite*" if lost == "database" else "audit.jsonl"):
        path.unlink()
    made.start()
    with pytest.raises(TermsError, match="older than 5"):
        made.grant(2)
    made.stop()


@pytest.mark.parametrize("which", ["consents alone", "all of the database"])
def test_a_consent_that_was_revoked_is_not_put_back(tmp_path: Path, which: str) -> None:
    made = Enclave(tmp_path, f"sqlite:///{tmp_path / 'state.sqlite'}")
    made.grant(1)
    made.consent()
    with made.state.reading() as connection:
        old = [dict(row) for row in connection.execute(select(consents)).mappings()]
    with sqlite3.connect(tmp_path / "old.sqlite") as copy, sqlite3.connect(tmp_path / "state.sqlite") as current:
        current.backup(copy)
    copy.close(), current.close()
    made.revoke(5)
    if which == "consents alone":
        with made.state.writing() as connection:
            connection.execute(insert(consents), old)
        made.restart()
    else:
        made.stop()
        for path in tmp_path.glob("state.sqlite-*"):
            path.unlink()
        (tmp_path / "old.sqlite").replace(tmp_path / "state.sqlite")
        made.start()
    with made.state.reading() as connection:
        assert connection.execute(select(consents)).all()
    made.grant(6)
    assert not made.may_leave()
    made.stop()


def test_a_consent_that_was_changed_does_not_count(enclave: Enclave) -> None:
    enclave.grant(1)
    enclave.consent()
    enclave.consent(adapter="another")
    with enclave.state.writing() as connection:  # each in the other's place
        first, second = connection.execute(select(consents).order_by(consents.c.number)).all()
        connection.execute(update(consents).where(consents.c.id == first.id).values(details=second.details))
    enclave.restart()
    enclave.grant(2)
    assert enclave.registry.consents("m") == 1
    assert not enclave.may_leave()


def test_a_consent_that_another_signed_does_not_count(enclave: Enclave) -> None:
    """Whoever has the bundle's key and the disk can seal one, and cannot sign it."""
    enclave.grant(1)
    stranger = Identity.generate("stranger")
    forged = Consent.from_signed(Consent("m", DIGEST, OWNER, ADAPTER).sign(stranger), stranger.fingerprint)
    provider = enclave.registry.grants[0].provider
    object.__setattr__(forged, "provider", provider)
    enclave.words.consented(forged, enclave.key)
    enclave.restart()
    enclave.grant(2)
    assert not enclave.may_leave()


def test_a_revocation_that_was_changed_stops_the_service(enclave: Enclave) -> None:
    enclave.grant(1)
    enclave.revoke(5)
    with enclave.state.writing() as connection:
        connection.execute(update(revocations).values(sequence=2))
    with pytest.raises(IntegrityError, match="revocation"):
        ProviderWords(enclave.state, enclave.log)
    with enclave.state.writing() as connection:
        connection.execute(update(revocations).values(signed=b'{"key":1}'))
    with pytest.raises(IntegrityError, match="signed"):
        ProviderWords(enclave.state, enclave.log)


@pytest.mark.parametrize("change", [{"sequence": "5"}, {"sequence": -1}, {"sequence": True}, {"provider": None}])
def test_a_log_whose_grants_are_none_stops_the_service(enclave: Enclave, change: dict[str, Any]) -> None:
    about = {"model": "m", "provider": "p", "sequence": 5, "document": "d"}
    enclave.log.append("p", "granted", about | change)
    with pytest.raises(IntegrityError, match="entry 0 of the audit log"):
        ProviderWords(enclave.state, enclave.log)


def test_sequences_never_fall(enclave: Enclave) -> None:
    enclave.grant(5)
    enclave.stop()
    (enclave.folder / "audit.jsonl").unlink()
    enclave.start()
    enclave.registry = GrantRegistry()
    enclave.grant(4)
    enclave.restart()
    with pytest.raises(TermsError, match="older than 5"):
        enclave.grant(3)


def test_a_request_for_consent_waits_over_a_restart(enclave: Enclave) -> None:
    enclave.grant(1)
    enclave.ask(ADAPTER)
    enclave.ask("ft:m:second")
    enclave.restart()
    assert enclave.registry.asked("m") == []  # not before its key is here again
    enclave.grant(2)
    waiting = [{"owner": OWNER, "adapter": it} for it in (ADAPTER, "ft:m:second")]
    assert enclave.registry.asked("m") == waiting
    enclave.consent()
    enclave.restart()
    enclave.grant(3)
    assert enclave.registry.asked("m") == waiting[1:]  # what was answered is not asked again
    assert enclave.may_leave()


@pytest.mark.parametrize("ended", ["revoked", "another bundle", "terms that need none"])
def test_a_request_for_consent_ends_with_what_it_was_for(enclave: Enclave, ended: str) -> None:
    enclave.grant(1)
    enclave.ask(ADAPTER)
    if ended == "revoked":
        enclave.revoke(2)
    elif ended == "another bundle":
        enclave.grant(2, manifest=OTHER)
    else:
        enclave.grant(2, export="never")
    assert enclave.registry.asked("m") == []
    enclave.restart()
    enclave.grant(3, **({"export": "never"} if ended == "terms that need none" else {}))
    assert enclave.registry.asked("m") == []


def test_requests_for_consent_are_sealed_and_bound_to_their_model(tmp_path: Path) -> None:
    made = Enclave(tmp_path, f"sqlite:///{tmp_path / 'state.sqlite'}")
    made.grant(1)
    made.ask(ADAPTER)
    made.stop()
    stored = b"".join(it.read_bytes() for it in tmp_path.iterdir())
    assert b"canary" not in stored
    made.start()
    with made.state.writing() as connection:
        connection.execute(update(asked).values(details=b"\x01" * 400))
    made.grant(2)
    assert made.registry.asked("m") == []
    made.stop()
