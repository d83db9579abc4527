"""What a fleet's file may say, and whom its policy accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune import Fleet
from obfuscatune.errors import ConfigError, UntrustedPeer
from obfuscatune.fleet.members import Member
from obfuscatune.fleet.placement import ALL
from obfuscatune.fleet.policy import Operator, Policy, key_of
from obfuscatune.protocol.authority import issue, load_authority, make_authority, make_request
from obfuscatune.protocol.certificates import fingerprint, make_identity


class Party:
    """An operator's authority, and certificates that it signed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.certificate, self.key = make_authority(name)

    def issued(self, name: str) -> bytes:
        request, _ = make_request(name)
        return issue(request, name, self.certificate, self.key)


@pytest.fixture(scope="module")
def cloud() -> Party:
    return Party("cloud-a")


@pytest.fixture
def folder(tmp_path: Path, cloud: Party) -> Path:
    (tmp_path / "cloud-a.pem").write_bytes(cloud.certificate)
    (tmp_path / "a1.pem").write_bytes(cloud.issued("a1"))
    self_signed, _ = make_identity("b1")
    (tmp_path / "b1.pem").write_bytes(self_signed)
    return tmp_path


def document(folder: Path) -> dict[str, object]:
    return {
        "members": [
            {"address": "tcp:10.0.0.7:7600", "certificate": "a1.pem", "operator": "cloud-a", "party": "compute",
             "memory": "40GiB"},
            {"address": "tcp:10.0.1.7:7600", "certificate": "b1.pem", "operator": "cloud-b", "party": "mask"},
        ],
        "operators": {
            "cloud-a": {"party": "compute", "authority": "cloud-a.pem"},
            "cloud-b": {"party": "mask", "keys": [fingerprint((folder / "b1.pem").read_bytes())]},
        },
        "placement": {"replicas": "all", "shard": "none", "hedge": "none", "wait_for": {"compute": 3}},
    }  # fmt: skip


def read(folder: Path, content: object) -> Fleet:
    path = folder / "fleet.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return Fleet.read(path)


def test_a_file_says_who_whom_to_trust_and_how_to_place(folder: Path) -> None:
    fleet = read(folder, document(folder))
    compute, mask = fleet.only("compute"), fleet.only("mask")
    assert [it.address for it in compute.members] == ["tcp:10.0.0.7:7600"]
    assert compute.members[0].memory == 40 << 30
    assert [it.operator for it in mask.members] == ["cloud-b"]
    assert (fleet.plan.replicas, fleet.plan.shard, fleet.hedge) == (ALL, False, False)
    assert fleet.only("compute").wait_for == {"compute": 3}


def test_a_certificate_stands_for_its_file(folder: Path) -> None:
    content: dict[str, Any] = document(folder)
    from_files = read(folder, content)
    for entry, name in ((content["members"][0], "certificate"), (content["operators"]["cloud-a"], "authority")):
        entry[name] = (folder / entry[name]).read_text()
    content["members"][1]["certificate"] = "\n" + (folder / "b1.pem").read_text()
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    alone = read(elsewhere, content)
    for party in ("compute", "mask"):
        assert [key_of(it) for it in alone.of(party)] == [key_of(it) for it in from_files.of(party)]
        assert alone.trusted_keys(party) == from_files.trusted_keys(party)


def test_who_is_trusted_is_who_the_policy_names_or_else_the_members(folder: Path) -> None:
    content: dict[str, Any] = document(folder)
    authority, a1, b1 = (fingerprint((folder / name).read_bytes()) for name in ("cloud-a.pem", "a1.pem", "b1.pem"))
    fleet = read(folder, content)
    assert (fleet.trusted_keys("compute"), fleet.trusted_keys("mask")) == ((authority,), (b1,))
    del content["operators"]
    fleet = read(folder, content)
    assert (fleet.trusted_keys("compute"), fleet.trusted_keys("mask")) == ((a1,), (b1,))
    assert Fleet.of_addresses(["unix:/run/a.sock"]).trusted_keys("compute") == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["placement"].update(wait_for={"compute": 0}), "greater than or equal to 1"),
        (lambda d: d["placement"].update(wait_for={"both": 1}), "wait_for"),
        (lambda d: d.update(member=[]), "Extra inputs"),
        (lambda d: d["members"][0].update(port=1), "Extra inputs"),
        (lambda d: d["members"][0].update(party="both"), "compute"),
        (lambda d: d["members"][0].update(memory="much"), "is no size"),
        (lambda d: d["members"][0].update(address="http://x"), "cannot be used"),
        (lambda d: d["members"][0].update(certificate="none.pem"), "cannot read the worker's certificate"),
        (lambda d: d["members"][0].update(certificate="b1.pem"), "refused by the file's own policy"),
        (lambda d: d["members"][0].pop("certificate"), "leaves this machine: name its certificate"),
        (lambda d: d["members"][0].update(operator="cloud-c"), "no operator cloud-c"),
        (lambda d: d["members"][0].update(party="mask"), "never the mask"),
        (lambda d: d["members"][1].update(address="tcp:10.0.0.7:7600"), "have one address"),
        (lambda d: d["members"].append(dict(d["members"][1], address="tcp:10.0.1.8:7600")), "have one key"),
        (lambda d: d["operators"]["cloud-b"].update(keys=[]), "at least 1"),
        (lambda d: d["operators"]["cloud-b"].update(keys=["AB"]), "pattern"),
        (lambda d: d["operators"]["cloud-b"].pop("keys"), "neither keys nor an authority"),
        (lambda d: d["operators"]["cloud-b"].update(authority="cloud-a.pem"), "in common"),
        (lambda d: d["operators"]["cloud-a"].update(keys=d["operators"]["cloud-b"]["keys"]), "in common"),
        (lambda d: d["operators"]["cloud-a"].update(authority="b1.pem"), "no certificate of an authority"),
        (lambda d: d["placement"].update(replicas=0), "greater than or equal to 1"),
        (lambda d: d["placement"].update(replicas=True), "replicas"),
        (lambda d: d.update(discover="ftp://x/y"), "http://HOST:PORT"),
        (lambda d: d.update(members=[]), "no members"),
    ],
)
def test_what_cannot_be_used_is_refused(folder: Path, change: object, message: str) -> None:
    content = document(folder)
    change(content)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message):
        read(folder, content)


def test_discovery_needs_a_policy(folder: Path) -> None:
    with pytest.raises(ConfigError, match="discover takes operators"):
        read(folder, {"discover": "http://10.0.0.2:7650/fleet.json"})


def test_a_file_that_others_can_write_is_refused(folder: Path) -> None:
    read(folder, document(folder))
    (folder / "fleet.yaml").chmod(0o666)
    with pytest.raises(ConfigError, match="changed by everybody"):
        Fleet.read(folder / "fleet.yaml")


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(["members", "discover", "operators", "placement", "x"]), json_like, max_size=4)
    | json_like
)
def test_any_file_is_a_fleet_or_one_typed_error(tmp_path: Path, content: object) -> None:
    try:
        read(tmp_path, yaml.safe_dump(content))
    except ConfigError as error:
        assert str(tmp_path / "fleet.yaml") in str(error)


def test_a_policy_accepts_pinned_keys_and_signed_certificates_alone(cloud: Party) -> None:
    pinned, stranger = (make_identity(name)[0] for name in ("pinned", "stranger"))
    policy = Policy([
        Operator("cloud-a", "compute", authority=load_authority(cloud.certificate)),
        Operator("cloud-b", "mask", frozenset({fingerprint(pinned)})),
    ])  # fmt: skip

    def member(certificate: bytes | None, operator: str, party: str) -> Member:
        return Member("tcp:10.0.0.7:7600", certificate, operator, party)  # type: ignore[arg-type]

    policy.check(member(cloud.issued("a"), "cloud-a", "compute"))
    policy.check(member(pinned, "cloud-b", "mask"))
    for refused in (
        member(stranger, "cloud-a", "compute"),
        member(stranger, "cloud-b", "mask"),
        member(pinned, "cloud-b", "compute"),
        member(pinned, "cloud-a", "compute"),
        member(cloud.issued("a"), "cloud-b", "mask"),
        member(cloud.certificate, "cloud-a", "compute"),
        member(Party("cloud-a").issued("a"), "cloud-a", "compute"),
        member(b"-----BEGIN CERTIFICATE-----", "cloud-a", "compute"),
        member(None, "cloud-a", "compute"),
        member(pinned, "cloud-c", "mask"),
    ):
        with pytest.raises(UntrustedPeer):
            policy.check(refused)
