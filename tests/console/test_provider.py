"""The provider's console: a key goes out once its enclave is verified and the evidence is kept, and not otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from obfuscatune.attest.record import read_record
from obfuscatune.channel.identity import Identity
from obfuscatune.console.provider import read_owners
from obfuscatune.errors import ConfigError
from obfuscatune.sealing.key_file import KeyFile
from obfuscatune.sealing.keys import BundleKey
from tests.channel.parties import DIGEST
from tests.console.conftest import ATTACK, Served, model_document
from tests.console.test_escape import harmless

FORM = {"file": "llama.key", "name": "llama", "bundle": "/bundles/llama", "owners": DIGEST, "until": "2099-01-01"}
FORM |= {"export": "provider-consent", "tokens": "1000", "uses": "inference"}


def write_key(served: Served, folder: Path, name: str = "llama.key", signer: str | None = None) -> bytes:
    key = BundleKey.generate()
    with key.secret.view as view:
        content = bytes(view)
    KeyFile(key, DIGEST, signer or served.connection.signer, "model").write(folder / name)
    return content


def test_a_grant_releases_the_key_of_the_file_and_keeps_the_evidence(provider_served: Served, tmp_path: Path) -> None:
    key = write_key(provider_served, tmp_path)
    browser, headers = provider_served.browser, provider_served.csrf(provider_served.browser)
    assert "llama.key" in browser.get("/models").text
    reply = browser.post("/grants", headers=headers, data=FORM)
    assert reply.status_code == 204 and reply.headers["hx-redirect"] == f"{provider_served.shell.base}/"
    assert provider_served.handler is not None
    ((_, _, grant, released),) = [it for it in provider_served.handler.came if it[0] == "grant"]
    assert released == key
    assert (grant.model, grant.storage, grant.terms.owners, grant.terms.tokens) == (
        "llama",
        "/bundles/llama",
        (DIGEST,),
        1000,
    )
    page = browser.get("/releases").text
    assert "simulated" in page and "llama" in page
    (kept,) = (tmp_path / "releases").glob("*.json")
    assert key.hex() not in kept.read_text() and (tmp_path / "releases").stat().st_mode & 0o077 == 0
    document = browser.get(f"/releases/{kept.stem}.json")
    (tmp_path / "verification").write_bytes(document.content)
    record = read_record(tmp_path / "verification")
    assert record.repeat().checks == record.checks and record.passed  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"file": "../other/llama.key"}, 400),
        ({"file": "others.key"}, 400),
        ({"owners": "no fingerprint"}, 400),
        ({"until": "tomorrow"}, 400),
        ({"until": "2099-01-01", "uses": "everything"}, 400),
        ({"export": "always"}, 400),
        ({"tokens": "-1"}, 400),
        ({"tokens": "1e9"}, 400),
        ({"name": "<b>"}, 400),
        ({"name": ""}, 400),
    ],
)
def test_what_cannot_be_granted_releases_nothing(
    provider_served: Served, tmp_path: Path, changed: dict[str, str], status: int
) -> None:
    write_key(provider_served, tmp_path)
    write_key(provider_served, tmp_path, "others.key", signer="ab" * 32)
    headers = provider_served.csrf(provider_served.browser) | {"hx-request": "true"}
    reply = provider_served.browser.post("/grants", headers=headers, data={**FORM, **changed})
    assert reply.status_code == status
    assert 'role="alert"' in reply.text
    assert provider_served.handler is not None
    assert not [it for it in provider_served.handler.came if it[0] == "grant"]
    assert not list((tmp_path / "releases").glob("*"))


def test_nothing_is_released_to_an_enclave_that_is_refused(provider_served: Served, tmp_path: Path) -> None:
    write_key(provider_served, tmp_path)
    headers = provider_served.csrf(provider_served.browser)
    provider_served.policies.append(provider_served.enclave.policy(software=["cd" * 32]))  # type: ignore[attr-defined]
    reply = provider_served.browser.post("/grants", headers=headers, data=FORM)
    assert reply.status_code == 503
    assert "claims.software" in reply.text
    assert provider_served.handler is not None
    assert not [it for it in provider_served.handler.came if it[0] == "grant"]
    assert not list((tmp_path / "releases").glob("*"))
    page = provider_served.browser.get("/")  # a look of a moment ago may still be shown; it says when
    provider_served.connection._look = None
    page = provider_served.browser.get("/")
    assert page.status_code == 503
    assert "claims.software" in page.text and "badge fails" in page.text


def test_where_evidence_cannot_be_kept_nothing_is_released(provider_served: Served, tmp_path: Path) -> None:
    write_key(provider_served, tmp_path)
    (tmp_path / "releases").write_text("a file in the place of the folder")
    headers = provider_served.csrf(provider_served.browser)
    reply = provider_served.browser.post("/grants", headers=headers, data=FORM)
    assert reply.status_code == 502 and "nothing was released" in reply.text
    assert provider_served.handler is not None
    assert not [it for it in provider_served.handler.came if it[0] == "grant"]


def test_consents_that_owners_wait_for_are_given_and_models_revoked(provider_served: Served) -> None:
    handler = provider_served.handler
    assert handler is not None
    handler.models = [model_document(asked=[{"owner": DIGEST, "adapter": "ft:llama:1"}], status="ready")]
    browser, headers = provider_served.browser, provider_served.csrf(provider_served.browser)
    provider_served.connection._look = None
    assert "ft:llama:1" in browser.get("/").text
    about = {"name": "llama", "manifest": DIGEST}
    assert browser.post(
        "/consent", headers=headers, data={**about, "owner": DIGEST, "adapter": "ft:llama:1"}
    ).is_success
    assert browser.post("/revoke", headers=headers, data=about).is_success
    consent, revocation = (next(it[2] for it in handler.came if it[0] == kind) for kind in ("consent", "revoke"))
    assert (consent.model, consent.owner, consent.adapter) == ("llama", DIGEST, "ft:llama:1")
    assert (revocation.model, revocation.manifest) == ("llama", DIGEST)


def test_what_an_enclave_says_of_grants_is_text(provider_served: Served) -> None:
    assert provider_served.handler is not None
    asked = [{"owner": ATTACK, "adapter": ATTACK}]
    provider_served.handler.models = [model_document(ATTACK, asked=asked, reason=ATTACK)]
    provider_served.connection._look = None
    reply = provider_served.browser.get("/")
    assert reply.status_code == 200
    assert "<script>alert(1)</script>" in harmless(provider_served, reply.text)


def test_a_release_that_was_changed_is_shown_as_unreadable(provider_served: Served, tmp_path: Path) -> None:
    (tmp_path / "releases").mkdir()
    name = f"{10**12}-{'a' * 32}"
    (tmp_path / "releases" / f"{name}.json").write_text("{}")
    (tmp_path / "releases" / "notes.json").write_text("{}")
    page = provider_served.browser.get("/releases")
    assert name in page.text and "badge fails" in page.text and "notes" not in page.text
    for path in (name, "notes", "..%2fllama", "x" * 400):
        assert provider_served.browser.get(f"/releases/{path}.json").status_code == 404


def test_owners_are_certificates_or_fingerprints() -> None:
    first, second = Identity.generate("a"), Identity.generate("b")
    text = f"{DIGEST}\n{first.certificate_pem.decode()}\n{second.certificate_pem.decode()}{DIGEST}"
    assert set(read_owners(text)) == {DIGEST, first.fingerprint, second.fingerprint}
    assert read_owners("a b") == ("a", "b")  # which no grant takes
    for wrong in ("-----BEGIN CERTIFICATE-----\nAAAA", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"):
        with pytest.raises(ConfigError):
            read_owners(wrong)
