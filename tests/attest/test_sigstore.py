"""Reference values that an identity of sigstore's signed: genuine ones are read, others refused with their reason."""

import json
from copy import deepcopy

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sigstore", reason="the extra `sigstore` is not installed")

from obfuscatune.attest.policy import Policy
from obfuscatune.attest.sigstore_bundle import verify_bundle
from obfuscatune.attest.simulated import Simulated
from obfuscatune.attest.verification import verify
from obfuscatune.errors import ConfigError, IntegrityError
from tests.attest.made import BINDING, CLAIMS, KEY, NOW, REPORT_DATA, public_hex, simulated_policy
from tests.attest.sigstore_world import IDENTITY, ISSUER, World, b64

VALUES = {"version": 1, "sequence": 3, "expires": 2_000_000_000, "values": {"simulated": {"measurement": ["ee" * 48]}}}
CONTENT = json.dumps(VALUES).encode()
WORLD = World()
BUNDLE = WORLD.sign(CONTENT)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("root") / "trusted_root.json"
    path.write_text(json.dumps(WORLD.trusted_root))
    return path


def check(root, bundle=BUNDLE, content=CONTENT, identity=IDENTITY, issuer=ISSUER):
    raw = bundle if isinstance(bundle, bytes) else json.dumps(bundle).encode()
    verify_bundle(content, raw, root, identity=identity, issuer=issuer)


def test_what_the_identity_signed_is_accepted(root):
    check(root)
    mail = WORLD.sign(CONTENT, "release@example.org", "https://accounts.example")
    check(root, mail, identity="release@example.org", issuer="https://accounts.example")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"content": CONTENT + b" "}, "message digest mismatch"),
        ({"identity": IDENTITY.replace("v1", "v2")}, "SANs do not match"),
        ({"identity": IDENTITY[:-1]}, "SANs do not match"),
        ({"issuer": "https://accounts.example"}, "OIDCIssuer does not match"),
        ({"bundle": World().sign(CONTENT)}, "certificate chain"),
        ({"bundle": WORLD.sign(CONTENT, minutes=11)}, "certificate chain"),
        ({"bundle": WORLD.sign(CONTENT, minutes=-1)}, "certificate chain"),
        ({"bundle": b"{}"}, ""),
        ({"bundle": b"[1]"}, ""),
        ({"bundle": b"\xff"}, ""),
        ({"bundle": json.dumps(WORLD.trusted_root).encode()}, ""),
    ],
)
def test_anything_else_is_refused_with_its_reason(root, more, reason):
    with pytest.raises(IntegrityError, match=f"the sigstore bundle is refused: .*{reason}"):
        check(root, **more)


def test_logs_and_authorities_are_those_of_the_trusted_root_alone(root, tmp_path):
    """Each of the three keys has to be the root's."""
    for name in ("ca_key", "ct_key", "rekor_key"):
        keys = {it: getattr(WORLD, it) for it in ("ca_key", "ct_key", "rekor_key") if it != name}
        with pytest.raises(IntegrityError, match="the sigstore bundle is refused"):
            check(root, World(**keys).sign(CONTENT))
    for missing in ("tlogs", "ctlogs", "certificateAuthorities"):
        path = tmp_path / missing
        path.write_text(json.dumps(WORLD.trusted_root | {missing: []}))
        with pytest.raises((ConfigError, IntegrityError)):
            check(path)


def test_an_attestation_about_the_file_is_no_signature_of_it(root):
    spoilt = deepcopy(BUNDLE)
    statement = {"_type": "https://in-toto.io/Statement/v1", "subject": [], "predicateType": "x", "predicate": {}}
    del spoilt["messageSignature"]
    spoilt["dsseEnvelope"] = {
        "payload": b64(json.dumps(statement).encode()),
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": b64(b"x"), "keyid": ""}],
    }
    with pytest.raises(IntegrityError, match="message signature"):
        check(root, spoilt)


def paths(value, path=()):
    """Where the texts of a document are."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*path, key))
    else:
        yield path


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(paths(BUNDLE), key=str)), st.data())
def test_no_text_of_a_bundle_can_be_changed(root, path, data):
    changed = deepcopy(BUNDLE)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    text = inner[path[-1]]
    places = list(range(len(text)))
    if path[-1] == "envelope":  # the name before a signature is not signed: the key is found by its id
        named = text.index("— ") + 2
        places = [it for it in places if not named <= it < named + len("log.invalid")]
    # Of the last character of padded base64 not all bits count.
    places = [it for it in places if text[it + 1 : it + 2] != "="]
    at = data.draw(st.sampled_from(places))
    other = data.draw(st.sampled_from([it for it in "A5z+" if it != text[at]]))
    inner[path[-1]] = text[:at] + other + text[at + 1 :]
    with pytest.raises(IntegrityError):
        check(root, changed)


def test_a_trusted_root_that_is_none_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none: cannot be read"):
        check(tmp_path / "none")
    for content in (b"", b"{}", b"[]", b"\xff", json.dumps(WORLD.trusted_root | {"mediaType": "x"}).encode()):
        (tmp_path / "root").write_bytes(content)
        with pytest.raises(ConfigError, match="is no trusted root"):
            check(tmp_path / "root")


SIGNER = {"identity": IDENTITY, "issuer": ISSUER, "trusted_root": "trusted_root.json"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ref.json").write_bytes(CONTENT)
    (tmp_path / "ref.json.sigstore.json").write_text(json.dumps(BUNDLE))
    (tmp_path / "trusted_root.json").write_text(json.dumps(WORLD.trusted_root))
    return tmp_path


def read(folder, **wanted):
    path = folder / "policy.yaml"
    path.write_text(
        yaml.safe_dump(simulated_policy(reference_values={"file": "ref.json", "sigstore": SIGNER} | wanted))
    )
    return Policy.from_file(path)


def test_a_policy_takes_reference_values_from_an_identity_and_verification_says_so(folder):
    found = read(folder, minimum_sequence=3)
    assert found.simulated is not None
    assert found.simulated.measurement == ("00" * 48, "ee" * 48)
    assert Policy.from_document(found.to_document()) == found
    evidence = Simulated(KEY).attest(REPORT_DATA)
    verified = verify(
        evidence, found, claims=CLAIMS, now=NOW, report_data=BINDING.report_data(CLAIMS), nonce=BINDING.nonce
    )
    lines = [str(it) for it in verified.checks if it.name == "reference_values"]
    assert lines == [
        f"holds  reference_values: {2_000_000_000 - NOW} s left; sequence 3, signed by {IDENTITY}, by {ISSUER}, "
        "in a sigstore bundle"
    ]


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (
            lambda it: (it / "ref.json.sigstore.json").unlink(),
            ConfigError,
            r"ref\.json\.sigstore\.json: cannot be read",
        ),
        (lambda it: (it / "trusted_root.json").unlink(), ConfigError, r"trusted_root\.json: cannot be read"),
        (
            lambda it: (it / "ref.json").write_bytes(CONTENT.replace(b"ee", b"ef")),
            IntegrityError,
            r"ref\.json: the sig",
        ),
        (lambda it: (it / "ref.json.sigstore.json").write_bytes(b"x" * 2**21), ConfigError, "larger than"),
    ],
)
def test_files_that_are_missing_or_changed(folder, spoil, kind, message):
    spoil(folder)
    with pytest.raises(kind, match=message):
        read(folder)


@pytest.mark.parametrize(
    "wanted",
    [
        {"keys": [public_hex()]},
        {"sigstore": None},
        {"sigstore": SIGNER | {"identity": ""}},
        {"sigstore": SIGNER | {"issuer": None}},
        {"sigstore": SIGNER | {"more": 1}},
        {"sigstore": {"identity": IDENTITY, "issuer": ISSUER}},
    ],
)
def test_a_policy_names_one_signer_wholly(folder, wanted):
    with pytest.raises(ConfigError, match="reference_values"):
        read(folder, **wanted)


def test_what_is_signed_is_still_read_strictly(folder):
    for values, message in (
        (VALUES | {"sequence": 2}, "older than the minimum_sequence"),
        (VALUES | {"more": 1}, "reference values have"),
        (VALUES | {"values": {"simulated": {"keys": [public_hex()]}}}, "simulated has measurement"),
    ):
        content = json.dumps(values).encode()
        (folder / "ref.json").write_bytes(content)
        (folder / "ref.json.sigstore.json").write_text(json.dumps(WORLD.sign(content)))
        with pytest.raises(ConfigError, match=message):
            read(folder, minimum_sequence=3)
