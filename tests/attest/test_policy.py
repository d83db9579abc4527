"""Policies: strict files, and reference values that somebody signed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from obfuscatune.attest import policy as policy_module
from obfuscatune.attest.policy import Policy
from obfuscatune.documents import sign
from obfuscatune.errors import ConfigError, IntegrityError
from tests.attest.made import CLAIMS_POLICY, KEY, NVIDIA_POLICY, SNP_POLICY, policy, public_hex, simulated_policy

TDX = {"mr_td": ["aa" * 48]}
WHOLE = simulated_policy(
    require=[["tdx", "sgx", "sev-snp", "simulated"], ["nvidia"], ["tpm"]],
    tdx=TDX,
    sgx={"mr_signer": ["bb" * 32], "isv_prod_id": 1},
    nvidia=NVIDIA_POLICY,
    tpm={"attestation_keys": ["cc" * 32], "pcrs": {"0": ["dd" * 32], "7": "any"}},
) | {"sev-snp": SNP_POLICY}


def write(tmp_path, document, name="policy.yaml"):
    path = tmp_path / name
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def test_a_policy_of_every_section_is_read_and_read_back(tmp_path):
    found = Policy.from_file(write(tmp_path, WHOLE))
    again = Policy.from_document(found.to_document())
    assert again == found
    assert again.digest == found.digest
    assert Policy.from_document(WHOLE | {"freshness_seconds": 60}).digest != found.digest


def test_defaults_refuse():
    tdx = Policy.from_document(simulated_policy(require=[["tdx"], ["simulated"]], tdx=TDX)).tdx
    assert tdx is not None
    assert tdx.tcb_statuses == ("UpToDate",)
    assert (tdx.rtmr1, tdx.mr_owner) == (("00" * 48,), ("00" * 48,))
    assert not (tdx.allow_smt or tdx.allow_cached_keys or tdx.allow_dynamic_platform or tdx.advisories)
    snp = Policy.from_document(simulated_policy(require=[["sev-snp"], ["simulated"]]) | {"sev-snp": SNP_POLICY}).sev_snp
    assert snp is not None
    assert not (snp.allow_milan or snp.allow_smt or snp.allow_migration_agent)
    assert not Policy.from_document(
        {k: v for k, v in simulated_policy().items() if k != "allow_simulated"}
    ).allow_simulated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tdxx": TDX}, "unknown key tdxx; did you mean tdx"),
        ({"require": []}, "require"),
        ({"require": [[]]}, "require"),
        ({"require": [["sgxx"]]}, "require"),
        ({"require": [["tdx"], ["simulated"]]}, "no section tdx"),
        ({"tdx": TDX}, "require does not name it"),
        ({"version": 2}, "version"),
        ({"version": True}, "version"),
        ({"freshness_seconds": 0}, "freshness_seconds"),
        ({"freshness_seconds": "60"}, "freshness_seconds"),
        ({"allow_simulated": "yes"}, "allow_simulated"),
        ({"allow_simulated": 1}, "allow_simulated"),
        ({"simulated": {"keys": []}}, "allows nothing"),
        ({"simulated": {"keys": "any"}}, "keys"),
        ({"simulated": {"keys": ["any"]}}, "named"),
        ({"simulated": {"keys": ["AA" * 32]}}, "lower-case hex"),
        ({"simulated": {"keys": [public_hex()], "measurment": "any"}}, "did you mean measurement"),
        ({"claims": CLAIMS_POLICY | {"configuration": "any"}}, "configuration"),
        ({"claims": CLAIMS_POLICY | {"mask_workers": ["any"]}}, "named"),
        ({"claims": CLAIMS_POLICY | {"enviroment": {}}}, "did you mean environment"),
        ({"claims": CLAIMS_POLICY | {"environment": {"A": []}}}, "environment"),
        ({"claims": CLAIMS_POLICY | {"environment": {"A": "any"}}}, "environment"),
        ({"claims": CLAIMS_POLICY | {"least_profile": "privat"}}, "least_profile"),
        ({"claims": {}}, "configuration is missing"),
        ({"require": [["tdx"], ["simulated"]], "tdx": {}}, "mr_td is missing"),
        ({"require": [["tdx"], ["simulated"]], "tdx": TDX | {"mr_td": ["aa"]}}, "48 bytes"),
        ({"require": [["tdx"], ["simulated"]], "tdx": TDX | {"tcb_statuses": ["Revoked"]}}, "tcb_statuses"),
        ({"require": [["sgx"], ["simulated"]], "sgx": {}}, "mr_enclave"),
        ({"require": [["sgx"], ["simulated"]], "sgx": {"mr_enclave": "any"}}, "mr_enclave"),
        ({"require": [["sgx"], ["simulated"]], "sgx": {"mr_signer": ["bb" * 32]}}, "isv_prod_id"),
        ({"require": [["sev-snp"]], "sev-snp": {"measurement": ["99" * 48]}}, "minimum_tcb is missing"),
        ({"require": [["tpm"]], "tpm": {"attestation_keys": ["cc" * 32], "pcrs": {"24": "any"}}}, "pcrs"),
        ({"require": [["tpm"]], "tpm": {"attestation_keys": ["cc" * 32], "pcrs": {}}}, "pcrs"),
    ],
)
def test_what_is_no_policy_is_refused_by_key(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        Policy.from_file(write(tmp_path, simulated_policy(**changes)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "accepts nothing"),
        ("[]", "accepts nothing"),
        ("version: 1\nversion: 1", "twice"),
        ("a: &x [1]\nb: *x", "alias"),
        ("1: 2", "no text"),
        ("a: !!python/object/apply:os.system [x]", "malformed YAML"),
        ("a: [", "malformed YAML"),
        ("version: 1.5", "float"),
        ("version: 2026-01-01", "date"),
        ("#" * 2_000_000, "larger"),
        ("\x00", "malformed YAML"),
        ("[" * 700, "malformed YAML"),
    ],
)
def test_what_is_no_yaml_of_a_policy_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        Policy.from_file(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        Policy.from_file(tmp_path / "none.yaml")


_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    lambda it: st.lists(it, max_size=3) | st.dictionaries(st.sampled_from([*WHOLE, *TDX, "keys", "x"]), it, max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(list(WHOLE)), _JUNK, max_size=4))
def test_junk_is_a_policy_or_a_config_error(junk):
    try:
        found = Policy.from_document(WHOLE | junk)
    except ConfigError:
        return
    assert found.require


def reference(values, *, key=KEY, sequence=3, expires=2_000_000_000, **more):
    document = {"version": 1, "sequence": sequence, "expires": expires, "values": values} | more
    return json.dumps(sign(document, "reference-values", key))


def test_signed_reference_values_widen_the_sets(tmp_path):
    write(tmp_path, reference({"simulated": {"measurement": ["ee" * 48]}, "tdx": {"mr_td": ["ab" * 48]}}), "ref.json")
    wanted = {"file": "ref.json", "keys": [public_hex()], "minimum_sequence": 3}
    found = Policy.from_file(write(tmp_path, simulated_policy(reference_values=wanted)))
    assert found.simulated is not None
    assert found.simulated.measurement == ("00" * 48, "ee" * 48)
    assert found.tdx is None  # they add to what the policy has, and nothing beside it
    assert found.reference_values is not None
    assert (found.reference_values.sequence, found.reference_values.expires) == (3, 2_000_000_000)
    assert Policy.from_document(found.to_document()) == found


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (reference({}, key=Ed25519PrivateKey.from_private_bytes(b"\1" * 32)), IntegrityError, "none of the keys"),
        (reference({}).replace('"sequence": 3', '"sequence": 4'), IntegrityError, "signature"),
        (reference({}, sequence=2), ConfigError, "older than the minimum_sequence"),
        (reference({"simulated": {"keys": [public_hex()]}}), ConfigError, "simulated has measurement"),
        (reference({"claims": {"configuration": ["22" * 32]}}), ConfigError, "claims has software"),
        (reference({"allow_simulated": True}), ConfigError, "no section"),
        (reference({"simulated": {"measurement": "any"}}), ConfigError, "simulated has measurement"),
        (reference({}, version=2), ConfigError, "version 2"),
        (reference({}, more=1), ConfigError, "reference values have"),
        ("{}", IntegrityError, "no signed document"),
    ],
)
def test_reference_values_that_are_not_ours_are_refused(tmp_path, content, kind, message):
    write(tmp_path, content, "ref.json")
    wanted = {"file": "ref.json", "keys": [public_hex()], "minimum_sequence": 3}
    with pytest.raises(kind, match=message):
        Policy.from_file(write(tmp_path, simulated_policy(reference_values=wanted)))


@pytest.mark.parametrize(
    "wanted", [[], {"file": "x"}, {"file": "x", "keys": 1}, {"file": "x", "keys": [], "sequence": 1}]
)
def test_reference_values_name_a_file_and_keys(tmp_path, wanted):
    with pytest.raises(ConfigError, match="reference_values"):
        Policy.from_file(write(tmp_path, simulated_policy(reference_values=wanted)))


def test_the_word_any_and_reference_values_contradict_each_other(tmp_path):
    write(tmp_path, reference({"simulated": {"measurement": ["ee" * 48]}}), "ref.json")
    wanted = {"file": "ref.json", "keys": [public_hex()]}
    document = simulated_policy(reference_values=wanted, simulated={"keys": [public_hex()], "measurement": "any"})
    with pytest.raises(ConfigError, match="take out one"):
        Policy.from_file(write(tmp_path, document))


def test_the_sets_of_a_policy_have_no_order():
    one, other = ["ab" * 48, "cd" * 48], ["cd" * 48, "ab" * 48, "ab" * 48]
    digests = {policy(simulated={"keys": [public_hex()], "measurement": values}).digest for values in (one, other)}
    assert len(digests) == 1


PAGE = (Path(__file__).parents[2] / "docs" / "attestation.md").read_text("utf-8")


def test_the_policies_of_the_page_are_policies():
    text = PAGE.replace("<96 hex digits>", "aa" * 48)
    text = text.replace("<64 hex digits>", "bb" * 32).replace("<Ed25519 public key, 64 hex digits>", "cc" * 32)
    whole, gpu, simulated = (yaml.safe_load(it) for it in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[:3])
    found = Policy.from_document(whole)
    assert found.tdx is not None
    assert found.tdx.rtmr3 == ("00" * 48,)
    assert Policy.from_document(whole | gpu | {"require": [["tdx", "sev-snp"], ["nvidia"]]}).nvidia is not None
    development = {"require": [["simulated"]], "version": 1, "claims": whole["claims"]}
    assert Policy.from_document(development | simulated).allow_simulated


def test_the_page_names_every_key():
    sections = [
        Policy,
        *(it for it in vars(policy_module).values() if isinstance(it, type) and issubclass(it, BaseModel)),
    ]
    keys = {field.alias or name for section in sections for name, field in section.model_fields.items()}
    keys -= {"version", "rtmr1", "rtmr2", "rtmr3"}  # "`rtmr0` to `rtmr3`"
    keys -= {"sequence", "expires"}  # of the reference values that were read
    missing = sorted(key for key in keys if f"`{key}`" not in PAGE and f"**{key}**" not in PAGE)
    assert missing == []
