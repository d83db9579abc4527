"""The settings of a service are read strictly, and say all of whom it trusts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from obfuscatune import Fleet
from obfuscatune.errors import ConfigError
from obfuscatune.protocol.authority import issue, make_authority, make_request
from obfuscatune.protocol.certificates import fingerprint, make_identity
from obfuscatune.service.settings import Settings, load_settings

YAML = """
listen: 127.0.0.1:8443
channel: "[::1]:7700"
state: /tmp/state
worker: {address: "unix:/run/w.sock"}
attestation: {producer: simulated, key_file: key.pem}
bundles: [/models, "s3://models"]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "service.yaml"
    path.write_text(text)
    return path


def test_settings_are_read(tmp_path: Path) -> None:
    found, content = load_settings(written(tmp_path, YAML))
    assert str(found.channel) == "[::1]:7700"
    assert content == YAML.encode()
    assert Settings.model_validate(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("listn: x", "unknown key listn; did you mean listen"),
        ("listen: nowhere", "expected HOST:PORT"),
        ("listen: 127.0.0.1:99999", "less than or equal to 65535"),
        ("profile: paper", "profile"),
        ("profile: guarded", "takes a mask_worker"),
        ("worker: null", "name a worker, or a fleet"),
        ("fleet: {members: []}", "name a worker, or a fleet in its place"),
        ("fleet: {membrs: []}", "unknown key fleet.membrs; did you mean members"),
        ('worker: {address: "http://x"}', "worker.address"),
        ('worker: {address: "tcp:h:1", peer: p.pem}', "no tls"),
        ("attestation: {producer: none}", "attestation"),
        ("limits: {files: 0}", "limits.files"),
        ('limits: {files: "3"}', "limits.files"),
        ("bundles: []", "bundles"),
        ("providers: [abc]", "providers"),
        ("state: [", "malformed YAML"),
        ("!!python/object/apply:os.system [x]: 1", "malformed YAML"),
    ],
)
def test_settings_are_strict(tmp_path: Path, line: str, reason: str) -> None:
    key = line.partition(":")[0]
    kept = "".join(it + "\n" for it in YAML.splitlines() if not it.startswith(f"{key}:"))
    with pytest.raises(ConfigError, match=reason):
        load_settings(written(tmp_path, kept + line + "\n"))


FLEET = YAML.replace(
    'worker: {address: "unix:/run/w.sock"}',
    """
fleet:
  members:
    - {address: "tcp:10.0.0.7:7600", certificate: FOLDER/a7.pem, operator: cloud-a, party: compute}
    - {address: "tcp:10.1.0.3:7600", certificate: FOLDER/b3.pem, operator: cloud-b, party: mask}
  discover: http://10.0.0.2:7650/fleet.json
  operators:
    cloud-a: {party: compute, authority: FOLDER/cloud-a.pem}
    cloud-b: {party: mask, keys: [KEY]}
tls: {certificate: cert.pem, private_key: key.pem}
profile: guarded
enclave_device: cpu
""",
)


@pytest.fixture
def fleet_yaml(tmp_path: Path) -> str:
    """Settings with a fleet of both parties, and the files that they name."""
    authority, key = make_authority("cloud-a")
    request, _ = make_request("a7")
    worker_of_b, _ = make_identity("b3")
    files = {"cloud-a.pem": authority, "a7.pem": issue(request, "a7", authority, key), "b3.pem": worker_of_b}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return FLEET.replace("FOLDER", str(tmp_path)).replace("KEY", fingerprint(worker_of_b))


def test_a_fleet_takes_the_place_of_workers(tmp_path: Path, fleet_yaml: str) -> None:
    found, _ = load_settings(written(tmp_path, fleet_yaml))
    assert found.trusted_keys("compute") == (fingerprint((tmp_path / "cloud-a.pem").read_bytes()),)
    assert found.trusted_keys("mask") == (fingerprint((tmp_path / "b3.pem").read_bytes()),)
    compute, mask = found.parties["compute"], found.parties["mask"]
    assert isinstance(compute, Fleet)
    assert isinstance(mask, Fleet)
    assert (compute.party, compute.discover) == ("compute", "http://10.0.0.2:7650/fleet.json")
    assert [it.address for it in mask.members] == found.addresses("mask") == ["tcp:10.1.0.3:7600"]
    alone, _ = load_settings(written(tmp_path, fleet_yaml.replace("profile: guarded", "profile: private")))
    assert set(alone.parties) == {"compute"}
    assert alone.trusted_keys("mask") == ()


def test_certificates_are_those_that_were_there_when_the_settings_were_read(tmp_path: Path, fleet_yaml: str) -> None:
    """Claims name their keys; whoever owns the disk must not put others in their place before a model is loaded."""
    found, _ = load_settings(written(tmp_path, fleet_yaml))
    trusted = {party: found.trusted_keys(party) for party in found.parties}
    other, _ = make_identity("other")
    for name in ("cloud-a.pem", "a7.pem", "b3.pem"):
        (tmp_path / name).write_bytes(other)
    of_job = Settings.model_validate(found.model_dump(mode="json"))
    assert of_job == found
    assert {party: of_job.trusted_keys(party) for party in of_job.parties} == trusted

    (tmp_path / "peer.pem").write_bytes(other)
    named = f"worker: {{address: 'tcp:h:1', peer: {tmp_path}/peer.pem}}\ntls: {{certificate: c, private_key: k}}"
    of_one, _ = load_settings(written(tmp_path, YAML.replace('worker: {address: "unix:/run/w.sock"}', named)))
    (tmp_path / "peer.pem").unlink()
    assert of_one.trusted_keys("compute") == (fingerprint(other),)


@pytest.mark.parametrize(
    ("line", "instead", "reason"),
    [
        ("tls: {certificate: cert.pem, private_key: key.pem}", "", "no tls is given"),
        (", certificate: FOLDER/a7.pem", "", "leaves this machine"),
        ('address: "tcp:10.0.0.7:7600", certificate: FOLDER/a7.pem', 'address: "unix:/run/a.sock"', "some do not"),
        ("party: mask, keys", "party: compute, keys", "never the mask"),
        ("FOLDER/cloud-a.pem", "FOLDER/gone.pem", "cannot read the authority's certificate"),
        ("keys: [KEY]", "keys: []", "fleet.operators.cloud-b.keys"),
        ("profile: guarded", "profile: guarded\nworker: {address: 'unix:/run/w.sock'}", "in its place"),
        ("profile: guarded", "profile: guarded\nmask_worker: {address: 'unix:/run/w.sock'}", "leave out mask_worker"),
    ],
)
def test_a_fleet_is_read_strictly(tmp_path: Path, fleet_yaml: str, line: str, instead: str, reason: str) -> None:
    written_as = {"FOLDER": str(tmp_path), "KEY": fingerprint((tmp_path / "b3.pem").read_bytes())}
    for name, value in written_as.items():
        line, instead = line.replace(name, value), instead.replace(name, value)
    assert line in fleet_yaml
    with pytest.raises(ConfigError, match=reason):
        load_settings(written(tmp_path, fleet_yaml.replace(line, instead)))


def test_one_hand_is_not_both_parties_of_a_fleet(tmp_path: Path) -> None:
    members = [
        {"address": f"device:cpu:{number}", "operator": party, "party": party}
        for number, party in enumerate(("compute", "mask"))
    ]
    text = YAML.replace('worker: {address: "unix:/run/w.sock"}', yaml.safe_dump({"fleet": {"members": members}}))
    with pytest.raises(ConfigError, match="both devices of this machine"):
        load_settings(written(tmp_path, text + "profile: guarded\n"))
    assert load_settings(written(tmp_path, text))[0].addresses("compute") == ["device:cpu:0"]


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given twice"):
        load_settings(written(tmp_path, YAML + "state: /elsewhere\n"))


@pytest.mark.parametrize(
    ("storage", "allowed"),
    [
        ("/models", True),
        ("/models/a", True),
        ("/models/../etc", False),
        ("/models2", False),
        ("s3://models/a", True),
        ("s3://modelsx", False),
        ("zip::/models/a", False),
        ("/models/a::x", False),
        ("/etc", False),
        ("", False),
    ],
)
def test_bundles_lie_where_they_may(tmp_path: Path, storage: str, allowed: bool) -> None:
    found, _ = load_settings(written(tmp_path, YAML))
    assert found.may_hold(storage) is allowed
