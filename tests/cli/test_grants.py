"""`obfuscatune provider grant`, `revoke`, `consent`, `status`, against a real server with simulated evidence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from obfuscatune.channel.identity import Identity
from obfuscatune.channel.server import ChannelServer
from obfuscatune.errors import TermsError
from obfuscatune.protocol.certificates import make_identity
from obfuscatune.sealing.key_file import KeyFile
from obfuscatune.sealing.keys import BundleKey
from obfuscatune.secret_memory import SecretBytes
from tests.channel.parties import DIGEST, KEY, UNTIL, Enclave

Run = Callable[..., Any]
UNTIL_TEXT = "2030-01-01"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, enclave: Enclave) -> Path:
    """Identities of a provider and an owner, a key file, a policy."""
    made = tmp_path_factory.mktemp("provider")
    for name in ("provider", "owner", "other"):
        (made / name).mkdir()
        certificate, key = make_identity(name)
        (made / name / "cert.pem").write_bytes(certificate)
        (made / name / "key.pem").touch(0o600)
        (made / name / "key.pem").write_bytes(key)
    signer = Identity.load(made / "provider").key.public_key().public_bytes_raw().hex()
    KeyFile(BundleKey(SecretBytes(KEY)), DIGEST, signer, "model").write(made / "bundle.key")
    KeyFile(BundleKey(SecretBytes(KEY)), DIGEST, signer, "data").write(made / "data.key")
    for name, policy in (("policy", enclave.policy()), ("other", enclave.policy(configuration=["cd" * 32]))):
        (made / f"{name}.yaml").write_text(yaml.safe_dump(policy.to_document()))
    return made


@pytest.fixture(scope="module")
def enclave() -> Enclave:
    return Enclave()


@pytest.fixture(scope="module")
def server(enclave: Enclave) -> Iterator[ChannelServer]:
    with enclave.server() as running:
        yield running


@pytest.fixture
def common(server: ChannelServer, enclave: Enclave, folder: Path) -> list[object]:
    enclave.handler.came.clear()
    enclave.handler.raises = None
    address = f"{server.address.host}:{server.address.port}"
    return ["--enclave", address, "--policy", folder / "policy.yaml", "--identity", folder / "provider"]


@pytest.fixture
def terms(folder: Path) -> list[object]:
    model = ["--bundle", "/models/llama", "--key-file", folder / "bundle.key", "--name", "llama"]
    return [*model, "--owner", folder / "owner" / "cert.pem", "--until", UNTIL_TEXT]


def test_a_grant_is_released_to_the_verified_enclave(
    obfuscatune: Run, common: list[object], terms: list[object], enclave: Enclave, folder: Path, tmp_path: Path
) -> None:
    document = tmp_path / "verified.json"
    more = ["--uses", "inference", "--export", "provider-consent", "--tokens", 1000, "--verification-out", document]
    ran = obfuscatune("provider", "grant", *common, *terms, *more, "--owner", "cd" * 32, "--json")
    assert ran.code == 0, ran.stderr
    kind, peer, grant, key = enclave.handler.came[0]
    owner, provider = (Identity.load(folder / name) for name in ("owner", "provider"))
    assert (kind, peer, key) == ("grant", provider.fingerprint, KEY)
    assert (grant.model, grant.manifest, grant.storage) == ("llama", DIGEST, "/models/llama")
    assert grant.terms.owners == (owner.fingerprint, "cd" * 32)
    assert (grant.terms.uses, grant.terms.export, grant.terms.until) == (("inference",), "provider-consent", UNTIL)
    assert grant.terms.tokens == 1000
    told = {"granted": "llama", "grant": grant.id, "manifest": DIGEST, "enclave": {"count": 1}}
    assert ran.document == told
    assert "holds  simulated.report_data" in ran.stderr and "SIMULATED: proves nothing" in ran.stderr
    assert f"whose key is {enclave.identity.fingerprint}" in ran.stderr
    assert KEY.hex() not in ran.stdout + ran.stderr + document.read_text()
    verified = obfuscatune("verify", document)
    assert verified.code == 0 and "checks hold" in verified.stdout


def test_nothing_is_released_to_an_enclave_that_the_policy_refuses(
    obfuscatune: Run, common: list[object], terms: list[object], enclave: Enclave, folder: Path
) -> None:
    ran = obfuscatune("provider", "grant", *common, *terms, "--policy", folder / "other.yaml")
    assert ran.code == 1 and enclave.handler.came == []
    assert "FAILS  claims.configuration: expected " + "cd" * 32 in ran.stderr
    assert "holds  simulated.report_data" in ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("error: claims.configuration")
    ran = obfuscatune("provider", "grant", *common, *terms, "--pin", "cd" * 32)
    assert ran.code == 1 and enclave.handler.came == [] and "not pinned" in ran.stderr


def test_revoke_consent_status(obfuscatune: Run, common: list[object], enclave: Enclave, folder: Path) -> None:
    model = ["--key-file", folder / "bundle.key", "--name", "llama"]
    assert obfuscatune("provider", "revoke", *common, *model).code == 0
    owner = folder / "owner" / "cert.pem"
    ran = obfuscatune("provider", "consent", *common, *model, "--owner", owner, "--adapter", "ft:llama:1")
    assert ran.code == 0 and "consented     ft:llama:1" in ran.stdout
    ran = obfuscatune("provider", "status", *common)
    assert ran.code == 0 and ran.stdout == "count 3\n"
    revocation, consent = enclave.handler.came[0][2], enclave.handler.came[1][2]
    assert (revocation.model, revocation.manifest) == ("llama", DIGEST)
    assert (consent.owner, consent.adapter) == (Identity.load(folder / "owner").fingerprint, "ft:llama:1")


def test_what_the_enclave_tells_cannot_write_to_the_terminal(
    obfuscatune: Run, common: list[object], enclave: Enclave, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"models": [{"na\x1bme": "llama\x1b[2J"}], "none": None}
    monkeypatch.setattr(enclave.handler, "status", lambda peer: told)
    ran = obfuscatune("provider", "status", *common)
    assert ran.stdout == "models.1.na?me llama?[2J\nnone           None\n"
    assert json.loads(obfuscatune("provider", "status", *common, "--json").stdout) == told


def test_a_refusal_is_told_in_one_line(
    obfuscatune: Run, common: list[object], terms: list[object], enclave: Enclave
) -> None:
    enclave.handler.raises = TermsError("sequence: 1 is older than 2, which was heard")
    ran = obfuscatune("provider", "grant", *common, *terms)
    assert ran.code == 1
    assert (
        ran.stderr.splitlines()[-1] == "error: the enclave refuses grant: sequence: 1 is older than 2, which was heard"
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--until", "tomorrow"], "until"),
        (["--uses", "training"], "uses"),
        (["--export", "maybe"], "export"),
        (["--name", "org/model"], "model"),
        (["--owner", "nowhere.pem"], "nowhere.pem"),
        (["--owner", "{folder}/policy.yaml"], "no certificate"),
        (["--key-file", "{folder}/data.key"], "holds a data"),
        (["--key-file", "{folder}/policy.yaml"], "key file"),
        (["--identity", "{folder}"], "cert.pem"),
        (["--identity", "{folder}/other"], "another identity"),
        (["--enclave", "unix:/run/x"], "host and a port"),
        (["--enclave", "enclave.example"], "tcp:enclave.example"),
        (["--fetch-collateral", "intel"], "--collateral"),
        (["--verification-out", "{folder}/policy.yaml"], "not overwritten"),
        (["--policy", "{folder}/bundle.key"], "unknown key"),
    ],
)
def test_options_that_cannot_be_used(
    obfuscatune: Run,
    common: list[object],
    terms: list[object],
    enclave: Enclave,
    folder: Path,
    options: list[str],
    text: str,
) -> None:
    given = [it.replace("{folder}", str(folder)) for it in options]
    ran = obfuscatune("provider", "grant", *common, *terms, *given)
    assert ran.code == 2 and enclave.handler.came == []
    assert text in ran.stderr.splitlines()[-1]
