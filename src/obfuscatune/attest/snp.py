"""SEV-SNP reports: AMD SEV-SNP firmware ABI (publication 56860), section 7.3, versions 2 to 5.

1. The structure: length, version, signature algorithm; whatever no signature covers is zero.
2. VCEK or VLEK, ASK or ASVK, pinned ARK.
3. The signature of the report.
4. The certificate is that of the report's processor, key and firmware.
5. The report data.
6. What the policy says of platform and guest.
"""

import struct
from collections.abc import Mapping

from cryptography.hazmat.primitives.hashes import SHA384

from obfuscatune.attest.amd import ROOTS, Chip, Product, check_chain
from obfuscatune.attest.checks import Checks
from obfuscatune.attest.evidence import Evidence, decode_base64
from obfuscatune.attest.fields import ecdsa_verifies
from obfuscatune.attest.policy import SnpPolicy
from obfuscatune.errors import EvidenceError

REPORT_BYTES = 1184
SIGNED_BYTES = 672
_VERSIONS = (2, 3, 4, 5)
_ECDSA_P384_SHA384 = 1
_LAYOUTS: Mapping[str, tuple[str | None, ...]] = {
    "Milan": ("bootloader", "tee", None, None, None, None, "snp", "microcode"),
    "Genoa": ("bootloader", "tee", None, None, None, None, "snp", "microcode"),
    "Turin": ("fmc", "bootloader", "tee", "snp", None, None, None, "microcode"),
}
"""The bytes of a TCB version. Turin's firmware orders them anew."""
_SMT, _ONE, _MIGRATION, _DEBUG = 1 << 16, 1 << 17, 1 << 18, 1 << 19
_KNOWN_POLICY_BITS = 0xFFFF | _SMT | _ONE | _MIGRATION | _DEBUG | 1 << 20 | 0b1111 << 22
"""ABI version, the four above, single socket; AES-256-XTS, no RAPL, ciphertext hiding, no page swapping."""
_CIPHERTEXT_HIDING, _ALIAS_CHECK = 1 << 4, 1 << 5


def check_snp(
    evidence: Evidence,
    policy: SnpPolicy,
    *,
    report_data: bytes,
    now: int,
    checks: Checks,
    roots: Mapping[str, Product] = ROOTS,
) -> None:
    """Check an SEV-SNP report.

    Args:
        evidence: The report, with the certificates VCEK or VLEK, ASK, ARK. Its collateral may hold `crl`, the
            revocation list of the ARK, as base64.
        policy: What is accepted.
        report_data: 64 bytes that the report must carry.
        now: Unix seconds.
        checks: Where the checks are added.
        roots: Products by the SHA-256 of their root's key.

    Raises:
        EvidenceError: it is no report, or the certificates are none.
    """
    report = evidence.quote
    if len(report) != REPORT_BYTES:  # 1
        raise EvidenceError(f"sev-snp: a report has {REPORT_BYTES} bytes, not {len(report)}")
    (version,) = struct.unpack_from("<I", report, 0)
    (algorithm,) = struct.unpack_from("<I", report, 0x34)
    if version not in _VERSIONS or algorithm != _ECDSA_P384_SHA384:
        raise EvidenceError(f"sev-snp: a report of version {version}, signed by algorithm {algorithm}")
    unsigned = report[SIGNED_BYTES + 48 : SIGNED_BYTES + 72] + report[SIGNED_BYTES + 120 :]
    checks.that("unsigned_bytes", not any(unsigned), expected="zero", found="zero" if not any(unsigned) else "others")

    chip = check_chain(evidence.certificates, _crl(evidence), now, checks, roots)  # 2
    if policy.require_crl:
        checks.that("crl", "crl" in evidence.collateral, expected="a revocation list", found=list(evidence.collateral))
    if chip is None:
        checks.that("signature", False, expected="by a certified key", found="no certified key")
        return
    r, s = (int.from_bytes(report[at : at + 72], "little") for at in (SIGNED_BYTES, SIGNED_BYTES + 72))
    genuine = ecdsa_verifies(chip.key, r, s, report[:SIGNED_BYTES], SHA384())
    checks.signed(genuine, by=f"the {chip.kind.upper()}")  # 3
    _check_chip(report, version, chip, checks)  # 4
    checks.equal("report_data", report[0x50:0x90].hex(), report_data.hex())  # 5
    _check_platform(report, chip, policy, checks)  # 6
    _check_guest(report, policy, checks)


def _check_chip(report: bytes, version: int, chip: Chip, checks: Checks) -> None:
    (key_info,) = struct.unpack_from("<I", report, 0x48)
    signing_key = {0: "vcek", 1: "vlek"}.get(key_info >> 2 & 0b111, "none")
    checks.equal("signing_key", signing_key, chip.kind)
    if version >= 3:
        family, model = report[0x188], report[0x189]
        product = _product(family, model)
        checks.that(
            "cpuid", product == chip.product, expected=chip.product, found=f"family {family:#x}, model {model:#x}"
        )
    else:  # no CPUID in the report: the certificate's product name is all there is
        checks.that("cpuid", chip.product != "Turin", expected="Milan or Genoa in version 2", found=chip.product)
    if chip.kind == "vcek":
        length = len(chip.hardware_id)  # 64 bytes; of Turin 8, and zeros behind
        checks.that("hardware_id", length == (8 if chip.product == "Turin" else 64), expected="whole", found=length)
        checks.equal("chip_id", report[0x1A0:0x1E0].hex(), chip.hardware_id.ljust(64, b"\0").hex())
    reported = _tcb(report, 0x180, chip.product)
    checks.equal("certified_tcb", _readable(reported), _readable(chip.tcb))


def _check_platform(report: bytes, chip: Chip, policy: SnpPolicy, checks: Checks) -> None:
    allowed = chip.product != "Milan" or policy.allow_milan
    checks.that(
        "processor",
        allowed,
        expected="Genoa or Turin: Milan's attestation root has been extracted, and takes allow_milan: true",
        found=chip.product,
    )
    checks.one_of("allowed_key", chip.kind, policy.signing_keys)
    minimum = policy.minimum_tcb.model_dump()
    for name, offset in (("current", 0x38), ("reported", 0x180), ("committed", 0x1E0), ("launch", 0x1F0)):
        tcb = _tcb(report, offset, chip.product)
        enough = all(number >= minimum[part] for part, number in tcb.items())
        checks.that(f"tcb.{name}", enough, expected=f"at least {_readable(minimum)}", found=_readable(tcb))
    (platform,) = struct.unpack_from("<Q", report, 0x40)
    for name, bit, required in (
        ("alias_check", _ALIAS_CHECK, policy.require_alias_check),
        ("ciphertext_hiding", _CIPHERTEXT_HIDING, policy.require_ciphertext_hiding),
    ):
        if required:
            checks.that(name, bool(platform & bit), expected="on", found="on" if platform & bit else "off")


def _check_guest(report: bytes, policy: SnpPolicy, checks: Checks) -> None:
    (bits,) = struct.unpack_from("<Q", report, 0x08)
    for name, bit, may_be_set in (
        ("debug", _DEBUG, False),
        ("migration_agent", _MIGRATION, policy.allow_migration_agent),
        ("smt", _SMT, policy.allow_smt),
    ):
        found = "allowed" if bits & bit else "not allowed"
        passed = may_be_set or not bits & bit
        checks.that(name, passed, expected="not allowed to the guest", found=found)
    known = bits & ~_KNOWN_POLICY_BITS == 0 and bool(bits & _ONE)
    checks.that("guest_policy", known, expected="no unknown bit", found=f"{bits:#x}")
    (vmpl,) = struct.unpack_from("<I", report, 0x30)
    checks.one_of("vmpl", str(vmpl), [str(level) for level in policy.vmpl])
    (guest_svn,) = struct.unpack_from("<I", report, 0x04)
    checks.at_least("guest_svn", guest_svn, policy.minimum_guest_svn)
    checks.measured("measurement", report[0x90:0xC0], policy.measurement)
    checks.measured("host_data", report[0xC0:0xE0], policy.host_data)
    checks.measured("id_key_digest", report[0xE0:0x110], policy.id_key_digest)
    checks.measured("author_key_digest", report[0x110:0x140], policy.author_key_digest)


def _product(family: int, model: int) -> str:
    """The product of a processor by CPUID: its extended family and model."""
    if family == 0x19 and model <= 0x0F:
        return "Milan"
    if family == 0x19 and (0x10 <= model <= 0x1F or 0xA0 <= model <= 0xAF):
        return "Genoa"
    if family == 0x1A and model <= 0x1F:
        return "Turin"
    return "unknown"


def _tcb(report: bytes, offset: int, product: str) -> dict[str, int]:
    names = _LAYOUTS[product]
    return {name: report[offset + index] for index, name in enumerate(names) if name is not None}


def _readable(tcb: Mapping[str, int]) -> str:
    order = ("fmc", "bootloader", "tee", "snp", "microcode")
    return ", ".join(f"{name} {tcb[name]}" for name in order if name in tcb)


def _crl(evidence: Evidence) -> bytes | None:
    text = evidence.collateral.get("crl")
    return None if text is None else decode_base64(text, "sev-snp: crl")
