"""SEV-SNP reports: genuine ones of Milan, and ones of Genoa and Turin that tests sign with keys of their own."""

from __future__ import annotations

import base64
import contextlib
import random
import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.attest.checks import Checks
from obfuscatune.attest.der import read_certificate, read_revocation_list
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.policy import SnpPolicy
from obfuscatune.attest.snp import check_snp
from obfuscatune.documents import canonical
from obfuscatune.errors import EvidenceError
from tests.attest.made import NOW, REPORT_DATA, SNP_POLICY, Amd, certificate

TODAY = 1_795_960_000
"""2026-11-29, within the validity of the genuine certificates."""


def snp_policy(**changes):
    return SnpPolicy.model_validate_json(canonical(SNP_POLICY | changes))


def failures(evidence, policy, *, report_data=REPORT_DATA, now=NOW, roots=None):
    checks = Checks()
    more = {} if roots is None else {"roots": roots}
    check_snp(evidence, policy, report_data=report_data, now=now, checks=checks, **more)
    assert checks.all
    return {check.name for check in checks.failed}


@pytest.fixture(scope="session")
def milan(sample, chain):
    """Genuine evidence, its report data, and the policy that it meets."""
    report = sample("snp-virtee/report_milan.hex")
    evidence = Evidence("sev-snp", report, (sample("snp-virtee/vcek_milan.der"), *chain("snp-virtee/cert_chain_milan")))
    policy = snp_policy(
        measurement=[report[0x90:0xC0].hex()],
        minimum_tcb={"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115},
        allow_milan=True,
        allow_smt=True,
    )
    return evidence, report[0x50:0x90], policy


def test_a_genuine_report_of_milan_verifies_where_the_policy_allows_milan(milan):
    evidence, report_data, policy = milan
    assert failures(evidence, policy, report_data=report_data, now=TODAY) == set()
    strict = policy.model_copy(update={"allow_milan": False})
    assert failures(evidence, strict, report_data=report_data, now=TODAY) == {"processor"}


def test_a_genuine_report_with_debugging_is_genuine_and_refused(sample, chain):
    report = sample("snp-google/attestation.bin")
    chains = [chain("snp-google/milan.testcer"), chain("snp-google/ask_ark_milan.pem")]
    policy = snp_policy(
        measurement=[report[0x90:0xC0].hex()],
        minimum_tcb={"bootloader": 2, "tee": 0, "snp": 5, "microcode": 68},
        allow_milan=True,
        allow_smt=True,
    )
    for authorities in chains:
        evidence = Evidence("sev-snp", report, (sample("snp-google/vcek.testcer"), *authorities))
        assert failures(evidence, policy, report_data=report[0x50:0x90], now=TODAY) == {"debug"}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"measurement": ["00" * 48]}, "measurement"),
        ({"host_data": ["01" * 32]}, "host_data"),
        ({"id_key_digest": ["01" * 48]}, "id_key_digest"),
        ({"author_key_digest": ["01" * 48]}, "author_key_digest"),
        ({"allow_smt": False}, "smt"),
        ({"minimum_guest_svn": 1}, "guest_svn"),
        ({"vmpl": (1,)}, "vmpl"),
        ({"signing_keys": ("vlek",)}, "allowed_key"),
        ({"require_alias_check": True}, "alias_check"),
        ({"require_ciphertext_hiding": True}, "ciphertext_hiding"),
        ({"require_crl": True}, "crl"),
    ],
)
def test_each_line_of_a_policy_refuses(milan, changes, name):
    evidence, report_data, policy = milan
    changed = SnpPolicy.model_validate_json(canonical(policy.model_dump(mode="json") | changes))
    assert failures(evidence, changed, report_data=report_data, now=TODAY) == {name}


@pytest.mark.parametrize("part", ["bootloader", "snp", "microcode"])
def test_an_old_tcb_is_refused(milan, part):
    evidence, report_data, policy = milan
    minimum = policy.minimum_tcb.model_copy(update={part: getattr(policy.minimum_tcb, part) + 1})
    changed = policy.model_copy(update={"minimum_tcb": minimum})
    names = {f"tcb.{it}" for it in ("current", "reported", "committed", "launch")}
    assert failures(evidence, changed, report_data=report_data, now=TODAY) == names


def test_other_report_data_and_other_times_are_refused(milan):
    evidence, report_data, policy = milan
    assert failures(evidence, policy, report_data=bytes(64), now=TODAY) == {"report_data"}
    assert failures(evidence, policy, report_data=report_data, now=1_600_000_000) == {
        "valid.leaf",
        "valid.intermediate",
        "valid.root",
    }
    assert failures(evidence, policy, report_data=report_data, now=1_950_000_000) == {"valid.leaf"}


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _flips_are_refused(milan, bits):
    evidence, report_data, policy = milan
    for bit in bits:
        changed = replace(evidence, quote=flipped(evidence.quote, bit))
        try:
            found = failures(changed, policy, report_data=report_data, now=TODAY)
        except EvidenceError:
            continue  # the version, or the algorithm
        if bit < 672 * 8:
            assert "signature" in found, bit
        else:
            assert found & {"signature", "unsigned_bytes"}, bit


def test_a_changed_bit_is_refused(milan):
    rng = random.Random(1)
    _flips_are_refused(milan, [8 * byte + rng.randrange(8) for byte in range(0, 1184, 9)])


@pytest.mark.long
def test_each_changed_bit_is_refused(milan):
    _flips_are_refused(milan, range(1184 * 8))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_changed_bit_of_a_certificate_is_refused(milan, index):
    evidence, report_data, policy = milan
    rng = random.Random(index)
    certificate = evidence.certificates[index]
    for _ in range(25):
        changed = list(evidence.certificates)
        changed[index] = flipped(certificate, rng.randrange(8 * len(certificate)))
        try:
            found = failures(replace(evidence, certificates=tuple(changed)), policy, report_data=report_data, now=TODAY)
        except EvidenceError:
            continue
        assert found & {"root", "chain.root", "chain.intermediate", "chain.leaf"}


@pytest.mark.parametrize("authorities", ["ask_ark_genoa.pem", "ask_ark_turin_vcek.pem", "ask_ark_milan_vlek.pem"])
def test_the_authorities_of_another_product_or_kind_of_key_are_refused(milan, chain, authorities):
    evidence, report_data, policy = milan
    other = replace(evidence, certificates=(evidence.certificates[0], *chain(f"snp-google/{authorities}")))
    assert "chain.leaf" in failures(other, policy, report_data=report_data, now=TODAY)


def test_the_report_of_another_chip_is_refused(milan, sample):
    evidence, report_data, policy = milan
    other = replace(evidence, quote=sample("snp-google/attestation.bin"))
    assert {"signature", "chip_id"} <= failures(other, policy, report_data=report_data, now=TODAY)


def test_the_genuine_chain_of_turin_holds(sample, chain):
    certificates = (sample("snp-virtee/vcek_turin.der"), *chain("snp-virtee/cert_chain_turin"))
    found = failures(Evidence("sev-snp", Amd.make("Turin").report(), certificates), snp_policy(), now=TODAY)
    assert "signature" in found
    assert not {it for it in found if it.startswith(("root", "chain", "valid", "names", "product"))}


def test_a_serial_number_of_zero_is_read_without_a_warning(sample):
    assert read_certificate(sample("snp-virtee/vcek_milan.der"), "VCEK").serial == 0


# From here on with keys of the test's own.


@pytest.mark.parametrize("product", ["genoa", "turin"])
@pytest.mark.parametrize("vlek", [False, True])
def test_genoa_and_turin_verify_by_vcek_and_vlek(request, product, vlek):
    amd = request.getfixturevalue(product)
    assert failures(amd.evidence(vlek=vlek), snp_policy(), roots=amd.roots) == set()


@pytest.mark.parametrize("product", ["genoa", "turin"])
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({0x08: struct.pack("<Q", 1 << 17 | 1 << 19)}, {"debug"}),
        ({0x08: struct.pack("<Q", 1 << 17 | 1 << 18)}, {"migration_agent"}),
        ({0x08: struct.pack("<Q", 1 << 17 | 1 << 16)}, {"smt"}),
        ({0x08: struct.pack("<Q", 0)}, {"guest_policy"}),
        ({0x08: struct.pack("<Q", 1 << 17 | 1 << 21)}, {"guest_policy"}),
        ({0x08: struct.pack("<Q", 1 << 17 | 1 << 40)}, {"guest_policy"}),
        ({0x30: struct.pack("<I", 2)}, {"vmpl"}),
        ({0x48: struct.pack("<I", 1 << 2)}, {"signing_key"}),
        ({0xC0: b"\1"}, {"host_data"}),
        ({0x188: b"\x19\x01"}, {"cpuid"}),
        ({0x188: b"\x17\x01"}, {"cpuid"}),
        ({0x1A0: b"\xff"}, {"chip_id"}),
        ({0x1DF: b"\xff"}, {"chip_id"}),
        ({0x38: bytes(8)}, {"tcb.current"}),
        ({0x1E0: bytes(8)}, {"tcb.committed"}),
        ({0x1F0: bytes(8)}, {"tcb.launch"}),
        ({0x180: bytes(8)}, {"tcb.reported", "certified_tcb"}),
        ({0x180: b"\xff" * 8}, {"certified_tcb"}),
    ],
)
def test_what_a_signed_report_says_is_held_against_policy_and_certificate(request, product, changes, names):
    amd = request.getfixturevalue(product)
    evidence = amd.evidence(amd.report(changes=changes))
    assert failures(evidence, snp_policy(), roots=amd.roots) == names


def test_turins_firmware_numbers_lie_in_turins_order(turin):
    for index, part in enumerate(["fmc", "bootloader", "tee", "snp", "microcode"]):
        minimum = SNP_POLICY["minimum_tcb"] | {part: turin.tcb[index] + 1}
        found = failures(turin.evidence(), snp_policy(minimum_tcb=minimum), roots=turin.roots)
        assert found == {f"tcb.{it}" for it in ("current", "reported", "committed", "launch")}


def test_version_2_names_no_processor_and_cannot_be_turins(genoa, turin):
    second = {0x00: struct.pack("<I", 2), 0x188: b"\0\0"}
    assert failures(genoa.evidence(genoa.report(changes=second)), snp_policy(), roots=genoa.roots) == set()
    assert failures(turin.evidence(turin.report(changes=second)), snp_policy(), roots=turin.roots) == {"cpuid"}


def test_a_vlek_is_certified_by_the_authority_of_vleks(genoa):
    mixed = (genoa.certificates(vlek=True)[0], *genoa.certificates()[1:])
    evidence = Evidence("sev-snp", genoa.report(vlek=True), mixed)
    assert "chain.leaf" in failures(evidence, snp_policy(), roots=genoa.roots)


def test_a_chip_cannot_certify_another(genoa, turin):
    """A leaf in the place of an authority."""
    leaf = genoa.certificates()[0]
    evidence = Evidence("sev-snp", genoa.report(), (leaf, leaf, genoa.certificates()[2]))
    assert {"chain.intermediate", "signature"} <= failures(evidence, snp_policy(), roots=genoa.roots)
    assert "root" in failures(genoa.evidence(), snp_policy(), roots=turin.roots)


def test_what_the_certificates_call_themselves_fits(genoa):
    def found(**changes):
        evidence = Evidence("sev-snp", genoa.report(vlek=changes.get("vlek", False)), genoa.certificates(**changes))
        return failures(evidence, snp_policy(), roots=genoa.roots)

    assert found(vlek=True, middle="SEV-Genoa") == {"names"}
    assert found(middle="SEV-VLEK-Genoa") == {"names"}
    assert found(product="Milan-B0") == {"product"}
    assert found(product="Siena-B1") == found(product="Genoa-B1") == set()


def test_an_intermediate_that_may_not_sign_others_is_refused(genoa):
    leaf, _, root = genoa.certificates()
    middle = certificate(genoa.intermediate, "SEV-Genoa", genoa.root, "ARK-Genoa", authority=False)
    evidence = Evidence("sev-snp", genoa.report(), (leaf, middle, root))
    assert failures(evidence, snp_policy(), roots=genoa.roots) == {"chain.leaf", "signature"}


def test_a_revocation_list_is_checked_where_there_is_one(genoa, turin):
    serial = read_certificate(genoa.certificates()[1], "ASK").serial
    required = snp_policy(require_crl=True)

    def found(crl, now=NOW):
        collateral = {"crl": base64.b64encode(crl).decode()}
        return failures(replace(genoa.evidence(), collateral=collateral), required, roots=genoa.roots, now=now)

    assert found(genoa.crl()) == set()
    assert found(genoa.crl(12345)) == set()
    assert found(genoa.crl(12345, serial)) == {"crl.revoked"}
    assert found(turin.crl()) == {"crl.signature"}
    assert found(genoa.crl(), now=NOW + 40 * 86400) == {"crl.current"}
    with pytest.raises(EvidenceError):
        found(b"junk")
    with pytest.raises(EvidenceError, match="base64"):
        failures(replace(genoa.evidence(), collateral={"crl": "?"}), required, roots=genoa.roots)


def test_what_no_signature_covers_is_zero(genoa):
    for byte in (720, 743, 792, 815, 816, 1183):
        changed = flipped(genoa.report(), 8 * byte)
        assert "unsigned_bytes" in failures(genoa.evidence(changed), snp_policy(), roots=genoa.roots)


@pytest.mark.parametrize("report", [b"", bytes(1183), bytes(1185), bytes(1184), b"\x09" + bytes(1183)])
def test_what_is_no_report_is_refused(genoa, report):
    with pytest.raises(EvidenceError):
        failures(genoa.evidence(report), snp_policy(), roots=genoa.roots)
    with pytest.raises(EvidenceError, match="certificates"):
        failures(replace(genoa.evidence(), certificates=()), snp_policy(), roots=genoa.roots)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_changed_certificates_and_lists_are_read_or_refused(data):
    amd = _once()
    whole = data.draw(st.sampled_from([*amd.certificates(vlek=True), amd.crl(1, 2)]))
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = whole[:at] + data.draw(st.binary(max_size=6)) + whole[at + data.draw(st.integers(0, 6)) :]
    for read in (read_certificate, read_revocation_list):
        with contextlib.suppress(EvidenceError):
            read(changed, "it")


_KEPT: list[Amd] = []


def _once() -> Amd:
    if not _KEPT:
        _KEPT.append(Amd.make("Genoa"))
    return _KEPT[0]


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=80))
def test_junk_is_no_certificate(junk):
    for read in (read_certificate, read_revocation_list):
        with pytest.raises(EvidenceError):
            read(junk, "it")
