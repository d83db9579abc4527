"""TDX and SGX quotes, versions 3 to 5, through `dcap-qvl`.

    1. The structure: a quote of the kind, and zeros behind what is signed.
    2. Signatures up to Intel's root, by the collateral; what state the collateral says the platform is in.
    3. The report data.
    4. What the policy says of platform and TD or enclave.

`dcap-qvl` returns a bad state of the platform as it returns a good one: that it is acceptable is checked here.
"""

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

from obfuscatune.attest.checks import Checks
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.policy import DcapPolicy, SgxPolicy, TdxPolicy
from obfuscatune.errors import ConfigError, EvidenceError

MOST_QUOTE_BYTES = 64 * 1024
"""A quote with its certificates takes 5 KB; cloud interfaces pad it to 8 KB."""
_HEADER_BYTES = 48
_BODY_HEADER_BYTES = 6
"""Type and length, which bodies have from version 5 on."""
_ISV_PROD_ID = 256
"""Offset in the body of an SGX report; behind it comes ISVSVN."""
_ECDSA_BYTES = 64 + 64
"""Signature and attestation key."""
_QE_REPORT_BYTES = 384 + 64
"""The quoting enclave's report, and its signature by the platform's key (PCK)."""
_QE_REPORT_DATA = 6
"""The type of certification data that begins with the quoting enclave's report."""
_SGX_BODY_BYTES, _TDX_BODY_BYTES = 384, 584
_TDX_TEE = 0x81

_TD_DEBUG = 1 << 0
_TD_UNTRUSTED = 0xFF
"""The first byte of TDATTRIBUTES: a bit of it that is set puts the TD outside of any trust."""
_TD_SEPT_VE_DISABLE = 1 << 28
_TD_MIGRATABLE = 1 << 29
_TD_KNOWN = _TD_UNTRUSTED | _TD_SEPT_VE_DISABLE | _TD_MIGRATABLE | 1 << 30 | 1 << 31 | 1 << 63
"""With protection keys, key locker and performance counters, which are the guest's own affair."""
_SGX_DEBUG = 1 << 1

_MEASUREMENTS = {
    "mr_td": "mr_td",
    "rtmr0": "rt_mr0",
    "rtmr1": "rt_mr1",
    "rtmr2": "rt_mr2",
    "rtmr3": "rt_mr3",
    "mr_config_id": "mr_config_id",
    "mr_owner": "mr_owner",
    "mr_owner_config": "mr_owner_config",
    "mr_service_td": "mr_service_td",
    "mr_seam": "mr_seam",
    "xfam": "xfam",
}
"""Fields of `TdxPolicy`, and `dcap-qvl`'s names of them."""


def check_tdx(evidence: Evidence, policy: TdxPolicy, *, report_data: bytes, now: int, checks: Checks) -> None:
    """Check a TDX quote.

    Args:
        evidence: The quote. Its collateral is that of `dcap-qvl` (`QuoteCollateralV3`), field by field.
        policy: What is accepted.
        report_data: 64 bytes that the quote must carry.
        now: Unix seconds, at which the collateral must be valid.
        checks: Where the checks are added.

    Raises:
        EvidenceError: it is no quote of TDX.
        ConfigError: `dcap-qvl` is not installed.
    """
    report = _check_quote(evidence, policy, report_data, now, checks)
    attributes = int.from_bytes(report.td_attributes, "little")
    checks.that("debug", not attributes & _TD_DEBUG, expected="off", found="on" if attributes & _TD_DEBUG else "off")
    sound = (
        not attributes & (_TD_UNTRUSTED | _TD_MIGRATABLE)
        and bool(attributes & _TD_SEPT_VE_DISABLE)
        and not attributes & ~_TD_KNOWN
    )
    checks.that(
        "attributes", sound, expected="SEPT_VE_DISABLE; not migratable, no unknown bit", found=f"{attributes:#018x}"
    )
    minimum = bytes.fromhex(policy.minimum_tee_tcb_svn)
    enough = all(number >= least for number, least in zip(report.tee_tcb_svn, minimum, strict=True))
    checks.that("tee_tcb_svn", enough, expected=f"at least {minimum.hex()}", found=report.tee_tcb_svn)
    for name, theirs in _MEASUREMENTS.items():
        if hasattr(report, theirs):  # mr_service_td: from TDX 1.5 on
            checks.measured(name, getattr(report, theirs), getattr(policy, name))


def check_sgx(evidence: Evidence, policy: SgxPolicy, *, report_data: bytes, now: int, checks: Checks) -> None:
    """Check an SGX quote. Arguments and errors are those of `check_tdx`."""
    report = _check_quote(evidence, policy, report_data, now, checks)
    attributes = int.from_bytes(report.attributes[:8], "little")
    checks.that("debug", not attributes & _SGX_DEBUG, expected="off", found="on" if attributes & _SGX_DEBUG else "off")
    if policy.mr_enclave is not None:
        checks.measured("mr_enclave", report.mr_enclave, policy.mr_enclave)
    if policy.mr_signer is not None:
        checks.measured("mr_signer", report.mr_signer, policy.mr_signer)
    version, body = struct.unpack_from("<H", evidence.quote, 0)[0], _HEADER_BYTES
    if version >= 5:
        body += _BODY_HEADER_BYTES
    isv_prod_id, isv_svn = struct.unpack_from("<HH", evidence.quote, body + _ISV_PROD_ID)
    if policy.isv_prod_id is not None:
        checks.equal("isv_prod_id", isv_prod_id, policy.isv_prod_id)
    checks.at_least("isv_svn", isv_svn, policy.minimum_isv_svn)


def parse_quote(quote: bytes, kind: str) -> Any:
    """The quote as `dcap-qvl` reads it.

    Raises:
        EvidenceError: it is none of this kind.
        ConfigError: `dcap-qvl` is not installed.
    """
    qvl = _import_qvl()
    if len(quote) > MOST_QUOTE_BYTES:
        raise EvidenceError(f"{kind}: a quote of {len(quote):,} bytes; at most {MOST_QUOTE_BYTES:,} are read")
    try:
        parsed = _call(qvl.parse_quote, quote)
    except ValueError as error:
        raise EvidenceError(f"{kind}: {error}") from error
    if parsed.quote_type().lower() != kind:
        raise EvidenceError(f"{kind}: this is a quote of {parsed.quote_type()}")
    return parsed


def _check_quote(evidence: Evidence, policy: DcapPolicy, report_data: bytes, now: int, checks: Checks) -> Any:
    quote = evidence.quote
    parsed = parse_quote(quote, evidence.kind)  # 1
    rest = quote[_end_of_signature(quote) :]
    checks.that("unsigned_bytes", not any(rest), expected="zero", found=f"{len(rest)} bytes" + ", not zero" * any(rest))
    claims = _verify(quote, evidence.collateral, now, checks)  # 2
    if claims is not None:
        _check_platform(claims, policy, checks)
    checks.equal("report_data", parsed.report.report_data.hex(), report_data.hex())  # 3
    return parsed.report


def _verify(quote: bytes, collateral: Mapping[str, str], now: int, checks: Checks) -> dict[str, Any] | None:
    """Signatures, revocation lists, validity. None where one does not hold."""
    if not checks.that("collateral", bool(collateral), expected="some", found="some" if collateral else "none"):
        return None
    qvl = _import_qvl()
    expected = "signed by Intel's root, by collateral that is valid now"
    try:
        given = _call(qvl.QuoteCollateralV3.from_json, json.dumps(dict(collateral)))
        lenient = qvl.QuotePolicy.claims_only(now)
        claims = _call(qvl.QuoteVerifier().verify_with_policy, quote, given, now, lenient)
        document: dict[str, Any] = json.loads(claims.to_json())
    except ValueError as error:
        checks.that("signature", False, expected=expected, found=error)
        return None
    checks.that("signature", True, expected=expected, found="valid")
    return document


def _check_platform(claims: Mapping[str, Any], policy: DcapPolicy, checks: Checks) -> None:
    try:
        status, advisories = claims["tcb"]["status"], claims["tcb"]["advisory_ids"]
        evaluation = min(claims["tcb"]["eval_data_number"], claims["qe"]["tcb_eval_data_number"])
        platform = claims["platform"]["pck"]
        states = {name: platform[name] for name in ("dynamic_platform", "cached_keys", "smt_enabled")}
    except (KeyError, TypeError) as error:
        raise EvidenceError(f"dcap-qvl's answer lacks {error}: this program needs version 0.7") from error
    checks.one_of("tcb_status", status, policy.tcb_statuses)
    unknown = sorted(set(advisories) - set(policy.advisories))
    allowed = ", ".join(policy.advisories) or "none"
    checks.that("advisories", not unknown, expected=allowed, found=", ".join(unknown or advisories) or "none")
    checks.at_least("tcb_evaluation", evaluation, policy.minimum_tcb_evaluation)
    for name, may_be in (
        ("dynamic_platform", policy.allow_dynamic_platform),
        ("cached_keys", policy.allow_cached_keys),
        ("smt_enabled", policy.allow_smt),
    ):
        checks.that(name, may_be or states[name] == "False", expected="False", found=states[name])


def _end_of_signature(quote: bytes) -> int:
    """Where the quote ends. Every length in it must say the same, since no signature covers them."""
    try:
        version, _, tee = struct.unpack_from("<HHI", quote, 0)
        at = _HEADER_BYTES
        if version >= 5:
            at += _BODY_HEADER_BYTES + int(struct.unpack_from("<HI", quote, at)[1])
        else:
            at += _TDX_BODY_BYTES if tee == _TDX_TEE else _SGX_BODY_BYTES
        (length,) = struct.unpack_from("<I", quote, at)
        at += 4
        end = at + int(length)
        at += _ECDSA_BYTES
        ends = []
        if version >= 4:  # certification data that holds the rest
            kind, size = struct.unpack_from("<HI", quote, at)
            at += 6
            ends.append(at + int(size) if kind == _QE_REPORT_DATA else -1)
        at += _QE_REPORT_BYTES
        at += 2 + int(struct.unpack_from("<H", quote, at)[0])  # authentication data
        ends.append(at + 6 + int(struct.unpack_from("<HI", quote, at)[1]))
    except struct.error as error:
        raise EvidenceError("a quote that ends before its signature") from error
    if end > len(quote) or any(other != end for other in ends):
        raise EvidenceError("a quote whose lengths contradict each other")
    return end


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `dcap-qvl`. It is Rust: a panic in it is a BaseException, which would pass by every handler."""
    try:
        return function(*arguments)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError("dcap-qvl could not cope with it") from error


def _import_qvl() -> Any:
    try:
        import dcap_qvl  # type: ignore[import-untyped]  # no py.typed
    except ImportError as error:
        raise ConfigError("TDX and SGX quotes take dcap-qvl: pip install 'obfuscatune[service]'") from error
    return dcap_qvl
