"""TPM 2.0 quotes, made by hand, and of swtpm where it and tpm2-tools are installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import struct
import subprocess
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.attest.checks import Checks
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.policy import TpmPolicy
from obfuscatune.attest.producers import Joined, Tpm
from obfuscatune.attest.simulated import Simulated
from obfuscatune.attest.tpm import check_tpm, tpm_nonce
from obfuscatune.attest.verification import verify
from obfuscatune.errors import ConfigError, EvidenceError
from tests.attest.made import BINDING, CLAIMS, KEY, NOW, REPORT_DATA, policy

HANDLE = "0x81010002"
EXTENDED = hashlib.sha256(bytes(32) + b"\xab" * 32).digest()
"""PCR 7, extended once."""
ATTRIBUTES = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"


@pytest.fixture(scope="module")
def tcti(tmp_path_factory):
    """A software TPM with an attestation key at HANDLE."""
    if not all(map(shutil.which, ("swtpm", "tpm2_quote"))):
        pytest.skip("swtpm and tpm2-tools are not installed (Debian: apt install swtpm tpm2-tools)")
    folder = tmp_path_factory.mktemp("tpm")
    tcti = f"swtpm:path={folder / 's'}"
    command = ["swtpm", "socket", "--tpm2", "--daemon", "--flags", "not-need-init,startup-clear"]
    command += ["--tpmstate", f"dir={folder}", "--pid", f"file={folder / 'pid'}"]
    command += ["--server", f"type=unixio,path={folder / 's'}", "--ctrl", f"type=unixio,path={folder / 's'}.ctrl"]
    subprocess.run(command, check=True, timeout=60)  # returns when the daemon listens
    environment = {**os.environ, "TPM2TOOLS_TCTI": tcti}

    def run(*command):
        subprocess.run(command, check=True, env=environment, cwd=folder, capture_output=True, timeout=60)

    try:
        key = ("-C", "o", "-g", "sha256", "-G", "ecc256:ecdsa-sha256:null", "-a", ATTRIBUTES)
        run("tpm2_createprimary", *key, "-c", "key")
        run("tpm2_evictcontrol", "-C", "o", "-c", "key", HANDLE)
        run("tpm2_pcrextend", f"7:sha256={'ab' * 32}")
        yield tcti
    finally:
        os.kill(int((folder / "pid").read_text()), signal.SIGTERM)


def quote_by_hand():
    """A quote as the TPM's specification lays it out, of PCRs 0, 7 and 10."""

    def sized(field):
        return struct.pack(">H", len(field)) + field

    key, values = ec.generate_private_key(ec.SECP256R1()), {0: bytes(32), 7: EXTENDED, 10: bytes(32)}
    digest = hashlib.sha256(b"".join(values.values())).digest()
    selection = struct.pack(">IHB", 1, 0x000B, 3) + (1 << 0 | 1 << 7 | 1 << 10).to_bytes(3, "little")
    attest = struct.pack(">IH", 0xFF544347, 0x8018) + sized(b"\0\x0b" + bytes(32)) + sized(tpm_nonce(REPORT_DATA))
    attest += bytes(17 + 8) + selection + sized(digest)
    r, s = decode_dss_signature(key.sign(attest, ec.ECDSA(SHA256())))
    signature = struct.pack(">HH", 0x0018, 0x000B) + sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    collateral = {f"pcr.{index}": value.hex() for index, value in values.items()}
    return Evidence("tpm", sized(attest) + signature, (spki,), collateral)


def policy_of(evidence):
    """The policy that evidence of that key and of these registers meets."""
    key = hashlib.sha256(evidence.certificates[0]).hexdigest()
    return TpmPolicy(attestation_keys=(key,), pcrs={"0": ("00" * 32,), "7": (EXTENDED.hex(),)})


@pytest.fixture(scope="module", params=["by hand", "of swtpm"])
def quoted(request):
    """Evidence over our report data, and the policy that it meets."""
    if request.param == "by hand":
        evidence = quote_by_hand()
    else:
        evidence = Tpm(HANDLE, [7, 0, 10], request.getfixturevalue("tcti")).attest(REPORT_DATA)
    return evidence, policy_of(evidence)


def failures(evidence, wanted, report_data=REPORT_DATA):
    checks = Checks()
    check_tpm(evidence, wanted, report_data=report_data, checks=checks)
    assert checks.all
    return {check.name for check in checks.failed}


def test_a_quote_of_a_tpm_verifies(quoted):
    evidence, wanted = quoted
    assert failures(evidence, wanted) == set()
    assert set(evidence.collateral) == {"pcr.0", "pcr.7", "pcr.10"}


def test_other_report_data_keys_and_values_are_refused(quoted):
    evidence, wanted = quoted
    assert failures(evidence, wanted, bytes(64)) == {"nonce"}
    stranger = wanted.model_copy(update={"attestation_keys": ("00" * 32,)})
    assert failures(evidence, stranger) == {"attestation_key"}
    assert failures(evidence, wanted.model_copy(update={"pcrs": {"7": ("00" * 32,)}})) == {"pcr.7"}
    assert failures(evidence, wanted.model_copy(update={"pcrs": {"4": ("00" * 32,)}})) == {"pcr.4"}
    claimed = replace(evidence, collateral=evidence.collateral | {"pcr.7": "00" * 32})
    assert failures(claimed, wanted.model_copy(update={"pcrs": {"7": ("00" * 32,)}})) == {"pcr_digest"}
    with pytest.raises(EvidenceError, match="no value"):
        failures(replace(evidence, collateral={}), wanted)


def test_each_changed_byte_of_a_quote_is_refused(quoted):
    evidence, wanted = quoted
    for at in range(len(evidence.quote)):
        changed = bytearray(evidence.quote)
        changed[at] ^= 1
        try:
            assert "signature" in failures(replace(evidence, quote=bytes(changed)), wanted), at
        except EvidenceError:
            continue


def test_the_policy_asks_for_it_beside_other_evidence(tcti):
    both = Joined(Simulated(KEY), Tpm(HANDLE, [0, 7], tcti)).attest(REPORT_DATA)
    wanted = policy_of(both.parts[0])
    required = policy(require=[["simulated"], ["tpm"]], tpm=wanted.model_dump(mode="json"))
    found = verify(both, required, report_data=REPORT_DATA, claims=CLAIMS, nonce=BINDING.nonce, now=NOW)
    assert found.kinds == ("simulated", "tpm")


def test_without_such_a_key_there_is_no_evidence(tcti):
    with pytest.raises(EvidenceError, match="tpm2_readpublic failed"):
        Tpm("0x81010009", [0], tcti).attest(REPORT_DATA)


def test_without_the_tools_there_is_no_evidence(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EvidenceError, match="install tpm2-tools"):
        Tpm(HANDLE, [0]).attest(REPORT_DATA)


@pytest.mark.parametrize(("handle", "pcrs"), [("key.ctx", [0]), ("-o/etc/x", [0]), (HANDLE, []), (HANDLE, [24])])
def test_a_handle_and_registers_are_what_they_should_be(handle, pcrs):
    with pytest.raises(ConfigError):
        Tpm(handle, pcrs)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=120) | st.binary(max_size=80).map(lambda it: b"\0\x40\xff\x54\x43\x47\x80\x18" + it))
def test_junk_is_no_quote(junk):
    spki = b"key"
    wanted = TpmPolicy(attestation_keys=(hashlib.sha256(spki).hexdigest(),), pcrs={"0": ("00" * 32,)})
    with pytest.raises(EvidenceError):
        failures(Evidence("tpm", junk, (spki,)), wanted)
