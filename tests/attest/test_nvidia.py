"""Reports of NVIDIA GPUs: genuine ones of Hopper, and ones that tests sign with keys of their own."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.attest import nvidia
from obfuscatune.attest.checks import Checks
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.nvidia import check_nvidia, gpu_nonce, parse_report
from obfuscatune.attest.policy import NvidiaPolicy
from obfuscatune.documents import canonical
from obfuscatune.errors import EvidenceError
from tests.attest.made import NOW, NVIDIA_POLICY, REPORT_DATA, fingerprint

TODAY = 1_795_960_000
GENUINE = NvidiaPolicy(driver_versions=("550.90.07", "580.95.05"), vbios_versions=("96.00.9f.00.01", "96.00.74.00.1a"))
REPORT, OTHER_REPORT = "nvidia-trustee/hopperAttestationReport.txt", "nvidia-trustee/hopper_coco_report1.txt"
CHAIN, OTHER_CHAIN = "nvidia-trustee/hopper_cert_chain_case1.txt", "nvidia-trustee/hopper_coco_certs1.txt"


def failures(evidence, policy=GENUINE, *, report_data=REPORT_DATA, now=TODAY, root=nvidia.ROOT):
    checks = Checks()
    check_nvidia(evidence, policy, report_data=report_data, now=now, checks=checks, root=root)
    assert checks.all
    return {check.name for check in checks.failed}


def made_policy(**changes):
    return NvidiaPolicy.model_validate_json(canonical(NVIDIA_POLICY | changes))


@pytest.mark.parametrize(("report", "certificates"), [(REPORT, CHAIN), (OTHER_REPORT, OTHER_CHAIN)])
def test_genuine_reports_verify_but_for_the_nonce_that_is_not_ours(sample, chain, report, certificates):
    evidence = Evidence("nvidia", sample(report), chain(certificates))
    assert failures(evidence) == {"nonce"}
    assert failures(evidence, GENUINE.model_copy(update={"driver_versions": ("1",)})) == {"nonce", "driver_version"}
    assert failures(evidence, GENUINE.model_copy(update={"vbios_versions": ("1",)})) == {"nonce", "vbios_version"}
    assert {"valid.0", "valid.4"} <= failures(evidence, now=1_500_000_000)


def test_genuine_measurements_are_those_that_nvidias_verifier_reads(sample):
    import json

    claims = json.loads(sample("nvidia-trustee/hopperAttestationReport-claims.txt"))
    report = parse_report(sample(REPORT))
    assert {str(index): value.hex() for index, value in report.measurements.items()} == claims["measurements"]
    assert report.driver_version == claims["config"]["driver_version"]
    assert report.vbios_version == claims["config"]["vbios_version"]


@pytest.mark.parametrize(
    ("certificates", "reason"),
    [
        ("nvidia-trustee/hopper_cert_chain_case2.txt", "from the GPU's key to the root"),
        ("nvidia-trustee/hopper_cert_chain_case3.txt", "chain.1"),
        ("nvidia-trustee/hopper_cert_chain_case4.txt", "names no firmware"),
        (OTHER_CHAIN, "signature"),
    ],
)
def test_chains_that_should_be_refused_are(sample, chain, certificates, reason):
    evidence = Evidence("nvidia", sample(REPORT), chain(certificates))
    try:
        assert reason in failures(evidence)
    except EvidenceError as error:
        assert reason in str(error)


def test_changed_bits_of_a_genuine_report_are_refused(sample, chain):
    report, certificates = sample(REPORT), chain(CHAIN)
    rng = random.Random(1)
    for bit in rng.sample(range(8 * len(report)), 120):
        changed = bytearray(report)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert "signature" in failures(Evidence("nvidia", bytes(changed), certificates)), bit
        except EvidenceError:
            continue


def test_changed_bits_of_genuine_certificates_are_refused(sample, chain):
    report, certificates = sample(REPORT), chain(CHAIN)
    rng = random.Random(2)
    for _ in range(60):
        index = rng.randrange(len(certificates))
        changed = bytearray(certificates[index])
        bit = rng.randrange(8 * len(changed))
        changed[bit // 8] ^= 1 << bit % 8
        others = (*certificates[:index], bytes(changed), *certificates[index + 1 :])
        try:
            assert failures(Evidence("nvidia", report, others)) != {"nonce"}, (index, bit)
        except EvidenceError:
            continue


@pytest.fixture
def check(gpu):
    def made(evidence, policy=None, **more):
        return failures(evidence, policy or made_policy(), now=NOW, root=fingerprint(gpu.root), **more)

    return made


def test_a_report_over_our_report_data_verifies(gpu, check):
    assert check(gpu.evidence()) == set()
    assert check(gpu.evidence(gpu.report() + b"\0")) == set()  # as the driver returns it


def test_each_thing_that_a_signed_report_says_is_held_against_something(gpu, check):
    assert check(gpu.evidence(), report_data=bytes(64)) == {"nonce"}
    assert check(gpu.evidence(gpu.report(firmware_id=b"\xcd" * 48))) == {"firmware_id"}
    assert check(gpu.evidence(), made_policy(measurements={"1": ["22" * 48]})) == {"measurement.1"}
    assert check(gpu.evidence(), made_policy(measurements={"2": ["11" * 48]})) == {"measurement.2"}
    assert failures(gpu.evidence(), made_policy(), now=NOW) == {"root"}


def test_a_gpu_cannot_certify_another(gpu, check):
    leaf, root = gpu.certificates()
    other = gpu.another()
    assert "chain.0" in check(Evidence("nvidia", other.report(), (other.certificates()[0], leaf, root)))


@pytest.mark.parametrize("tail", [b"\1", b"\0\0", b"\0\1"])
def test_bytes_behind_the_signature_are_refused(gpu, tail):
    with pytest.raises(EvidenceError, match="behind the signature"):
        parse_report(gpu.report() + tail)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=200), at=st.integers(0, 400))
def test_junk_is_no_report(gpu, junk, at):
    report = gpu.report()
    for data in (junk, report[:at] + junk + report[at + 9 :]):
        try:
            parse_report(data)
        except EvidenceError:
            continue
        assert data.startswith(report[:2])
    with pytest.raises(EvidenceError):
        parse_report(report[: min(at, len(report) - 1)])


def test_the_nonce_is_of_32_bytes_and_of_the_report_data():
    assert len(gpu_nonce(REPORT_DATA)) == 32
    assert gpu_nonce(REPORT_DATA) != gpu_nonce(bytes(64))


def test_certificates_that_are_none_are_refused(gpu):
    for certificates in ((), (b"junk", b"junk"), gpu.certificates()[:1]):
        with pytest.raises(EvidenceError):
            failures(replace(gpu.evidence(), certificates=certificates), made_policy())
