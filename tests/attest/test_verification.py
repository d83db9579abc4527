"""What a policy requires, and what it does not foresee. Each refusal names its check."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from obfuscatune.attest.binding import Binding
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.policy import Policy
from obfuscatune.attest.producers import Joined
from obfuscatune.attest.simulated import WARNING, Simulated
from obfuscatune.attest.verification import Roots, verify
from obfuscatune.documents import canonical, sign
from obfuscatune.errors import EvidenceError, VerificationFailed
from tests.attest.made import (
    BINDING,
    CLAIMS,
    CLAIMS_POLICY,
    KEY,
    NOW,
    NVIDIA_POLICY,
    REPORT_DATA,
    SNP_POLICY,
    fingerprint,
    policy,
    public_hex,
    simulated_policy,
)

EVIDENCE = Simulated(KEY).attest(REPORT_DATA)


def verified(evidence=EVIDENCE, wanted=None, *, claims=CLAIMS, now=NOW, **more):
    """With the report data of these claims, as the verifier of a session has it."""
    more = {"report_data": BINDING.report_data(claims), "nonce": BINDING.nonce} | more
    return verify(evidence, wanted or policy(), claims=claims, now=now, **more)


def failures(*args, **more):
    with pytest.raises(VerificationFailed) as caught:
        verified(*args, **more)
    assert caught.value.checks
    return {check.name for check in caught.value.checks if not check.passed}


def test_what_is_verified_carries_claims_and_checks():
    found = verified()
    assert (found.claims, found.kinds, found.simulated) == (CLAIMS, ("simulated",), True)
    assert (found.time, found.expires) == (NOW, NOW + 3600)
    assert all(check.passed for check in found.checks)
    assert any(WARNING in str(check) for check in found.checks)


def test_simulated_evidence_takes_a_word_of_the_policy():
    assert failures(wanted=policy(allow_simulated=False)) == {"simulated.allowed"}


def test_simulated_evidence_by_another_key_is_refused():
    stranger = Simulated(Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)).attest(REPORT_DATA)
    assert failures(stranger) == {"simulated.key"}


def test_simulated_evidence_for_another_purpose_is_refused():
    document = {"version": 1, "warning": WARNING, "measurement": "00" * 48, "report_data": REPORT_DATA.hex()}
    assert failures(Evidence("simulated", canonical(sign(document, "grant", KEY)))) == {"simulated.signature"}


def test_another_measurement_is_refused():
    assert failures(Simulated(KEY, "01" * 48).attest(REPORT_DATA)) == {"simulated.measurement"}


@pytest.mark.parametrize("name", ["exporter", "attester", "verifier", "nonce"])
def test_evidence_of_another_session_is_refused(name):
    other: Binding = replace(BINDING, **{name: b"\xee" * 32})
    assert failures(report_data=other.report_data(CLAIMS)) == {"simulated.report_data"}


def test_claims_that_the_evidence_is_not_over_are_refused():
    assert failures(claims=replace(CLAIMS, boot="00" * 32)) == {"simulated.report_data"}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"configuration": "00" * 32}, "claims.configuration"),
        ({"arguments": ("serve", "--debug")}, "claims.arguments"),
        ({"arguments": ()}, "claims.arguments"),
        ({"environment": {"LD_PRELOAD": "x.so"}}, "claims.environment.LD_PRELOAD"),
        ({"environment": {"OMP_NUM_THREADS": "3"}}, "claims.environment.OMP_NUM_THREADS"),
        ({"environment": {"OMP_NUM_THREADS": "any"}}, "claims.environment.OMP_NUM_THREADS"),
        ({"workers": ("77" * 32, "99" * 32)}, "claims.workers"),
        ({"mask_workers": ("99" * 32,)}, "claims.mask_workers"),
        ({"profile": "paper"}, "claims.profile"),
    ],
)
def test_a_claim_that_was_not_foreseen_fails(changes, name):
    claims = replace(CLAIMS, **changes)
    assert failures(Simulated(KEY).attest(BINDING.report_data(claims)), claims=claims) == {name}


def test_claims_that_the_policy_does_not_name_must_be_empty():
    names = {"claims.arguments", "claims.environment.OMP_NUM_THREADS", "claims.workers", "claims.mask_workers"}
    assert failures(wanted=policy(claims={"configuration": ["22" * 32]})) == names


def test_a_variable_that_may_be_set_may_be_unset():
    claims = replace(CLAIMS, environment={}, profile="guarded", workers=())
    verified(Simulated(KEY).attest(BINDING.report_data(claims)), claims=claims)


def test_software_and_profile_are_held_against_the_policy():
    wanted = policy(claims=CLAIMS_POLICY | {"software": ["00" * 32], "least_profile": "guarded"})
    assert failures(wanted=wanted) == {"claims.software", "claims.profile"}


def test_one_party_cannot_be_worker_and_mask_worker():
    claims = replace(CLAIMS, mask_workers=CLAIMS.workers)
    wanted = policy(claims=CLAIMS_POLICY | {"mask_workers": ["77" * 32], "workers": "any"})
    assert failures(Simulated(KEY).attest(BINDING.report_data(claims)), wanted, claims=claims) == {"claims.parties"}


@pytest.mark.parametrize(("obtained", "fresh"), [(NOW, True), (NOW - 60, True), (NOW - 61, False), (NOW + 1, False)])
def test_evidence_grows_old(obtained, fresh):
    wanted = policy(freshness_seconds=60)
    if fresh:
        assert verified(wanted=wanted, obtained=obtained).expires == obtained + 60
    else:
        assert failures(wanted=wanted, obtained=obtained) == {"freshness"}


def test_reference_values_expire():
    values = {"file": "ref.json", "keys": [public_hex()], "sequence": 1, "expires": NOW}
    wanted = policy(reference_values=values)
    assert verified(wanted=wanted, now=NOW).expires == NOW
    assert failures(wanted=wanted, now=NOW + 1) == {"reference_values"}


def test_a_short_nonce_and_times_that_are_none_are_refused():
    assert failures(nonce=b"short") == {"nonce"}
    for now in (-1, 2**63):
        with pytest.raises(EvidenceError, match="time"):
            verified(now=now)
    with pytest.raises(EvidenceError, match="64 bytes"):
        verified(report_data=b"")


def test_every_requirement_is_met_or_it_fails(gpu):
    wanted = policy(require=[["simulated"], ["nvidia"]], nvidia=NVIDIA_POLICY)
    assert failures(wanted=wanted) == {"require.nvidia"}
    assert "require.simulated" in failures(gpu.evidence(), wanted)


def test_a_part_that_nothing_requires_is_refused(gpu):
    assert failures(replace(EVIDENCE, parts=(gpu.evidence(),))) == {"kind.nvidia"}
    assert failures(replace(EVIDENCE, parts=(EVIDENCE,))) == {"once.simulated"}


class _Given:
    def __init__(self, evidence):
        self._evidence = evidence

    def attest(self, report_data):
        return self._evidence


def cpu_and_gpu_policy(**changes):
    document = {k: v for k, v in simulated_policy().items() if "simulated" not in k}
    both = {"require": [["tdx", "sev-snp"], ["nvidia"]], "sev-snp": SNP_POLICY, "tdx": {"mr_td": ["00" * 48]}}
    return Policy.from_document(document | both | {"nvidia": NVIDIA_POLICY | changes})


def test_cpu_and_gpu_hold_together_and_neither_alone(genoa, gpu):
    roots = Roots(genoa.roots, fingerprint(gpu.root))
    both = Joined(_Given(genoa.evidence()), _Given(gpu.evidence())).attest(REPORT_DATA)
    assert both.kind == "sev-snp"
    found = verified(Evidence.from_bytes(both.to_bytes()), cpu_and_gpu_policy(), roots=roots)
    assert (found.kinds, found.simulated) == (("sev-snp", "nvidia"), False)
    assert failures(genoa.evidence(), cpu_and_gpu_policy(), roots=roots) == {"require.nvidia"}
    assert failures(gpu.evidence(), cpu_and_gpu_policy(), roots=roots) == {"require.tdx|sev-snp"}
    # A GPU whose report answers another session, beside a CPU that answers this one.
    replayed = replace(both, parts=(gpu.evidence(gpu.report(bytes(64))),))
    assert failures(replayed, cpu_and_gpu_policy(), roots=roots) == {"nvidia.nonce"}


def test_gpus_are_counted_by_their_keys(genoa, gpu):
    roots = Roots(genoa.roots, fingerprint(gpu.root))
    one, other = gpu.evidence(), gpu.another().evidence()
    verified(replace(genoa.evidence(), parts=(one, other)), cpu_and_gpu_policy(count=2), roots=roots)
    assert failures(replace(genoa.evidence(), parts=(one, one)), cpu_and_gpu_policy(count=2), roots=roots) == {"gpus"}


def test_without_roots_of_the_test_what_is_made_here_is_refused(genoa, gpu):
    both = replace(genoa.evidence(), parts=(gpu.evidence(),))
    assert {"sev-snp.root", "nvidia.root"} <= failures(both, cpu_and_gpu_policy())
