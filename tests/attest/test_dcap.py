"""TDX and SGX quotes: genuine ones with the collateral of their day."""

from __future__ import annotations

import contextlib
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.attest.checks import Checks
from obfuscatune.attest.dcap import check_sgx, check_tdx, parse_quote
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.policy import SgxPolicy, TdxPolicy
from obfuscatune.documents import canonical
from obfuscatune.errors import EvidenceError

pytest.importorskip("dcap_qvl")

JUNE_2025 = 1_751_000_000
SEPTEMBER_2025 = 1_757_000_000
CLOUD = {"allow_dynamic_platform": True, "allow_cached_keys": True, "allow_smt": True}
"""What genuine machines of clouds are."""
TDX_BODY = slice(48, 48 + 584)


def report_data_of(quote: bytes, *, at: int = 48 + 520) -> bytes:
    return quote[at : at + 64]


def tdx_policy(quote: bytes, **changes):
    report = parse_quote(quote, "tdx").report
    names = {"mr_td": "mr_td", "mr_config_id": "mr_config_id"} | {f"rtmr{i}": f"rt_mr{i}" for i in range(4)}
    measured = {ours: [getattr(report, theirs).hex()] for ours, theirs in names.items()}
    return TdxPolicy.model_validate_json(canonical(measured | CLOUD | changes))


def sgx_policy(**changes):
    return SgxPolicy.model_validate_json(canonical(changes))


def failures(evidence, policy, *, now=JUNE_2025, report_data=None):
    checks = Checks()
    if evidence.kind == "tdx":
        wanted = report_data_of(evidence.quote) if report_data is None else report_data
        check_tdx(evidence, policy, report_data=wanted, now=now, checks=checks)
    else:
        wanted = report_data_of(evidence.quote, at=48 + 320) if report_data is None else report_data
        check_sgx(evidence, policy, report_data=wanted, now=now, checks=checks)
    assert checks.all
    return {check.name for check in checks.failed}


@pytest.fixture(scope="session")
def evidence_of(sample):
    def make(name: str, collateral: str | None = None, kind: str = "tdx") -> Evidence:
        given = {} if collateral is None else json.loads(sample(collateral))
        return Evidence(kind, sample(name), (), given)

    return make


@pytest.fixture(scope="session")
def tdx(evidence_of):
    return evidence_of("tdx-phala/tdx_quote", "tdx-phala/tdx_quote_collateral.json")


@pytest.fixture(scope="session")
def sgx(evidence_of):
    return evidence_of("sgx-phala/sgx_quote", "sgx-phala/sgx_quote_collateral.json", "sgx")


SGX = {
    "mr_enclave": ["33d8736db756ed4997e04ba358d27833188f1932ff7b1d156904d3f560452fbb"],
    "tcb_statuses": ["ConfigurationAndSWHardeningNeeded"],
    "advisories": ["INTEL-SA-00289", "INTEL-SA-00615"],
} | CLOUD


def test_genuine_quotes_verify_at_the_time_of_their_collateral(tdx, sgx, evidence_of):
    assert failures(tdx, tdx_policy(tdx.quote)) == set()
    near = evidence_of("tdx-phala/near_quote.bin", "tdx-phala/near_quote_collateral.json")
    assert failures(near, tdx_policy(near.quote), now=SEPTEMBER_2025) == set()
    assert failures(sgx, sgx_policy(**SGX)) == set()


def test_defaults_refuse_genuine_platforms_of_clouds_and_a_bad_tcb(tdx, sgx):
    strict = dict.fromkeys(CLOUD, False)
    platform = {"dynamic_platform", "cached_keys", "smt_enabled"}
    assert failures(tdx, tdx_policy(tdx.quote, **strict)) == platform
    assert failures(sgx, sgx_policy(mr_enclave=SGX["mr_enclave"], **CLOUD)) == {"tcb_status", "advisories"}
    one = sgx_policy(**SGX | {"advisories": ["INTEL-SA-00289"]})
    assert failures(sgx, one) == {"advisories"}


@pytest.mark.parametrize(
    ("now", "name"), [(1_750_000_000, "signature"), (1_752_919_300, "signature"), (1_795_960_000, "signature")]
)
def test_collateral_that_is_not_valid_yet_or_any_longer_is_refused(tdx, now, name):
    assert failures(tdx, tdx_policy(tdx.quote), now=now) == {name}


@pytest.mark.parametrize(
    ("quote", "collateral", "nows"),
    [
        ("tdx-phala/tdx_quote_outdated", "tdx-phala/tdx_quote_outdated_collateral.json", (1_771_500_000,)),
        ("tdx-google/quote_v5_sample.dat", "tdx-google/quote_v5_sample.dat.collateral.json", (1_770_000_000,)),
        (
            "tdx-google/tdx_prod_quote_SPR_E4.dat",
            "tdx-google/tdx_prod_quote_SPR_E4.dat.collateral.json",
            (1_687_500_000, 1_711_000_000, 1_770_000_000),
        ),
        ("tdx-google/cos-113-tdx-quote.dat", None, (JUNE_2025,)),
        ("tdx-phala/quote-from-tappd.hex", None, (JUNE_2025,)),
        ("tdx-phala/tdx-quote.hex", None, (JUNE_2025,)),
        ("tdx-phala/tdx_quote", "tdx-phala/near_quote_collateral.json", (JUNE_2025, SEPTEMBER_2025)),
    ],
)
def test_samples_that_should_not_verify_do_not(evidence_of, quote, collateral, nows):
    evidence = evidence_of(quote, collateral)
    parsed = parse_quote(evidence.quote, "tdx")
    policy = tdx_policy(evidence.quote)
    for now in nows:
        found = failures(evidence, policy, now=now, report_data=parsed.report.report_data)
        assert found & {"signature", "collateral"}


def test_an_outdated_platform_is_told_apart_from_a_forgery(evidence_of):
    checks = Checks()
    evidence = evidence_of("tdx-phala/tdx_quote_outdated", "tdx-phala/tdx_quote_outdated_collateral.json")
    policy = tdx_policy(evidence.quote)
    check_tdx(evidence, policy, report_data=bytes(64), now=1_771_500_000, checks=checks)
    assert any("No matching TCB level" in check.found for check in checks.failed)


def test_bytes_behind_the_quote_are_zero(evidence_of, tdx):
    extra = evidence_of("tdx-google/tdx_prod_quote_SPR_E4.dat")
    assert "unsigned_bytes" in failures(extra, tdx_policy(extra.quote))
    padded = Evidence("tdx", tdx.quote + bytes(3000), (), tdx.collateral)
    assert failures(padded, tdx_policy(tdx.quote)) == set()
    for at in (4936, 5005):
        changed = bytearray(tdx.quote)
        changed[at] = 1
        assert failures(Evidence("tdx", bytes(changed), (), tdx.collateral), tdx_policy(tdx.quote)) == {
            "unsigned_bytes"
        }


@pytest.mark.parametrize("at", [632, 764])
def test_lengths_that_contradict_each_other_are_refused(tdx, at):
    """The length of the signature data, and the type of what is within. `dcap-qvl` reads past both."""
    changed = bytearray(tdx.quote)
    changed[at] += 1
    with pytest.raises(EvidenceError, match="contradict"):
        failures(Evidence("tdx", bytes(changed), (), tdx.collateral), tdx_policy(tdx.quote))


@pytest.mark.parametrize(
    "name", ["mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mr_config_id", "mr_owner", "mr_owner_config", "mr_seam"]
)
def test_each_measurement_is_held_against_the_policy(tdx, name):
    assert failures(tdx, tdx_policy(tdx.quote, **{name: ["ee" * 48]})) == {name}


def test_a_measurement_that_is_not_named_must_be_zero(tdx):
    policy = TdxPolicy.model_validate_json(canonical({"mr_td": "any"} | CLOUD))
    assert failures(tdx, policy) == {"rtmr0", "rtmr1", "rtmr2"}


def test_other_report_data_is_refused(tdx, sgx):
    assert failures(tdx, tdx_policy(tdx.quote), report_data=bytes(64)) == {"report_data"}
    assert failures(sgx, sgx_policy(**SGX), report_data=bytes(64)) == {"report_data"}


def test_collateral_before_a_tcb_recovery_is_refused(tdx):
    assert failures(tdx, tdx_policy(tdx.quote, minimum_tcb_evaluation=17)) == set()
    assert failures(tdx, tdx_policy(tdx.quote, minimum_tcb_evaluation=18)) == {"tcb_evaluation"}


def test_an_old_tdx_module_is_refused(tdx):
    assert failures(tdx, tdx_policy(tdx.quote, minimum_tee_tcb_svn="060103" + "00" * 13)) == set()
    for old in ("070103", "060203", "060104"):
        assert failures(tdx, tdx_policy(tdx.quote, minimum_tee_tcb_svn=old + "00" * 13)) == {"tee_tcb_svn"}


@pytest.mark.parametrize(
    ("attributes", "names"),
    [
        (1 << 28 | 1, {"debug", "attributes"}),
        (1 << 28 | 2, {"attributes"}),
        (1 << 28 | 1 << 29, {"attributes"}),
        (1 << 28 | 1 << 40, {"attributes"}),
        (0, {"attributes"}),
        (1 << 28 | 1 << 63, set()),
    ],
)
def test_attributes_of_a_td(tdx, attributes, names):
    """The signature fails as well, since only a TDX module could sign these."""
    changed = bytearray(tdx.quote)
    changed[48 + 120 : 48 + 128] = attributes.to_bytes(8, "little")
    found = failures(Evidence("tdx", bytes(changed), (), tdx.collateral), tdx_policy(tdx.quote))
    assert found == {"signature"} | names


def test_sgx_by_enclave_and_by_signer(sgx):
    signer = {"mr_signer": ["815f42f11cf64430c30bab7816ba596a1da0130c3b028b673133a66cf9a3e0e6"], "isv_prod_id": 0}
    rest = {name: value for name, value in SGX.items() if name != "mr_enclave"}
    assert failures(sgx, sgx_policy(**rest, **signer)) == set()
    assert failures(sgx, sgx_policy(**rest, **signer | {"isv_prod_id": 1})) == {"isv_prod_id"}
    assert failures(sgx, sgx_policy(**rest, **signer, minimum_isv_svn=1)) == {"isv_svn"}
    assert failures(sgx, sgx_policy(**rest, **signer | {"mr_signer": ["00" * 32]})) == {"mr_signer"}
    assert failures(sgx, sgx_policy(**SGX | {"mr_enclave": ["00" * 32]})) == {"mr_enclave"}
    changed = bytearray(sgx.quote)
    changed[48 + 48] |= 2
    debugged = Evidence("sgx", bytes(changed), (), sgx.collateral)
    assert failures(debugged, sgx_policy(**SGX)) == {"signature", "debug"}


def test_a_quote_of_one_kind_is_none_of_another(tdx, sgx):
    for quote, kind in ((tdx.quote, "sgx"), (sgx.quote, "tdx")):
        with pytest.raises(EvidenceError, match="this is a quote of"):
            parse_quote(quote, kind)


def _signed_bits(quote: bytes) -> range:
    """Header, report, signatures, the quoting enclave's report: all before the platform's certificates."""
    return range(8 * quote.index(b"-----BEGIN"))


def _flips_are_refused(evidence, policy, report_data, bits):
    for bit in bits:
        changed = bytearray(evidence.quote)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = failures(
                Evidence(evidence.kind, bytes(changed), (), evidence.collateral), policy, report_data=report_data
            )
        except EvidenceError:
            continue
        assert found, bit


def test_changed_bits_of_signed_parts_are_refused(tdx, sgx):
    rng = random.Random(1)
    for evidence, policy, at in ((tdx, tdx_policy(tdx.quote), 48 + 520), (sgx, sgx_policy(**SGX), 48 + 320)):
        bits = rng.sample(_signed_bits(evidence.quote), 250)
        _flips_are_refused(evidence, policy, report_data_of(evidence.quote, at=at), bits)


@pytest.mark.long
def test_each_changed_bit_of_signed_parts_is_refused(tdx, sgx):
    for evidence, policy, at in ((tdx, tdx_policy(tdx.quote), 48 + 520), (sgx, sgx_policy(**SGX), 48 + 320)):
        report_data = report_data_of(evidence.quote, at=at)
        _flips_are_refused(evidence, policy, report_data, _signed_bits(evidence.quote))


def test_changed_certificates_of_the_platform_are_refused(tdx):
    """Those that are relied upon, leaf and intermediate; of the root only the pinned key is."""
    rng = random.Random(2)
    begins = [at for at in range(len(tdx.quote)) if tdx.quote.startswith(b"-----BEGIN", at)]
    text = [at for at in range(begins[0] + 28, begins[2] - 28) if tdx.quote[at : at + 1].isalnum()]
    for at in rng.sample(text, 60):
        changed = bytearray(tdx.quote)
        changed[at] ^= 0x04
        found = Evidence("tdx", bytes(changed), (), tdx.collateral)
        try:
            assert failures(found, tdx_policy(tdx.quote)), at
        except EvidenceError:
            continue


def test_changed_collateral_is_refused(tdx):
    rng = random.Random(3)
    for name in ("tcb_info", "tcb_info_signature", "qe_identity", "qe_identity_signature", "root_ca_crl", "pck_crl"):
        for _ in range(8):
            text = tdx.collateral[name]
            at = rng.randrange(len(text))
            other = rng.choice([it for it in "0123456789" if it != text[at].lower()])
            collateral = tdx.collateral | {name: text[:at] + other + text[at + 1 :]}
            assert failures(Evidence("tdx", tdx.quote, (), collateral), tdx_policy(tdx.quote)) == {"signature"}
        without = {key: value for key, value in tdx.collateral.items() if key != name}
        assert failures(Evidence("tdx", tdx.quote, (), without), tdx_policy(tdx.quote)) == {"signature"}


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_cut_and_stretched_quotes_are_refused(tdx, data):
    quote = tdx.quote
    at = data.draw(st.integers(0, quote.index(b"-----BEGIN") - 1))
    changed = quote[:at] + data.draw(st.binary(max_size=8)) + quote[at + data.draw(st.integers(1, 300)) :]
    if changed == quote:
        return
    evidence = Evidence("tdx", changed, (), tdx.collateral)
    with contextlib.suppress(EvidenceError):
        assert failures(evidence, tdx_policy(quote), report_data=report_data_of(quote))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=100) | st.binary(max_size=100).map(lambda it: b"\4\0\2\0\x81\0\0\0" + it))
def test_junk_is_no_quote(junk):
    with pytest.raises(EvidenceError):
        failures(Evidence("tdx", junk, (), {"tcb_info": "{}"}), TdxPolicy(mr_td=("any",)), report_data=bytes(64))


def test_a_quote_that_is_too_long_is_not_parsed(tdx):
    with pytest.raises(EvidenceError, match="at most"):
        parse_quote(tdx.quote + bytes(70_000), "tdx")
