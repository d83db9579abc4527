"""Evidence and a policy: every check, and the verified claims or `VerificationFailed`.

    1. The policy requires something.
    2. Every part of the evidence is of a kind that the policy requires; every requirement is met by one.
    3. Each part is genuine, over this report data, and of a platform that its section accepts.
    4. The claims, which the report data binds, are ones that the policy foresees.
    5. Evidence and reference values are not too old.

All is checked that can be, so that a reader sees everything that fails at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from obfuscatune.attest import amd, nvidia
from obfuscatune.attest.binding import NONCE_BYTES
from obfuscatune.attest.checks import ANY, Check, Checks, shown
from obfuscatune.attest.claims import PROFILES, Claims
from obfuscatune.attest.dcap import check_sgx, check_tdx
from obfuscatune.attest.evidence import Evidence, check_report_data
from obfuscatune.attest.nvidia import check_nvidia
from obfuscatune.attest.policy import ClaimsPolicy, Policy
from obfuscatune.attest.simulated import check_simulated
from obfuscatune.attest.snp import check_snp
from obfuscatune.attest.tpm import check_tpm
from obfuscatune.errors import EvidenceError, VerificationFailed

LATEST = 253402300800
"""The year 10000, in Unix seconds."""


@dataclass(frozen=True)
class Roots:
    """SHA-256 of the manufacturers' root keys. Intel's is within `dcap-qvl`."""

    amd: Mapping[str, amd.Product]
    nvidia: str


PINNED = Roots(amd.ROOTS, nvidia.ROOT)


@dataclass(frozen=True)
class Verified:
    """What was verified. There is none of what was not."""

    claims: Claims
    kinds: tuple[str, ...]
    """Of the evidence, part by part."""
    policy_digest: str
    report_data: bytes
    nonce: bytes
    time: int
    """When it was verified, in Unix seconds."""
    expires: int
    """When it has to be verified anew, in Unix seconds."""
    checks: tuple[Check, ...]

    @property
    def simulated(self) -> bool:
        """Whether any of the evidence was simulated: then nothing is proven."""
        return "simulated" in self.kinds


def verify(
    evidence: Evidence,
    policy: Policy,
    *,
    report_data: bytes,
    claims: Claims,
    nonce: bytes,
    now: int,
    obtained: int | None = None,
    roots: Roots = PINNED,
) -> Verified:
    """Verify evidence.

    Args:
        evidence: What the attester sent.
        policy: What is accepted.
        report_data: 64 bytes: `Binding.report_data(claims)` of the verifier's own view of the session.
        claims: What the attester says of itself.
        nonce: The 32 bytes that the verifier drew for this session.
        now: Unix seconds.
        obtained: When the evidence came; None is now.
        roots: The manufacturers' keys. For tests: everybody else uses the pinned ones.

    Raises:
        VerificationFailed: a check failed. It carries them all.
        EvidenceError: the evidence is malformed.
    """
    check_report_data(report_data)
    came = now if obtained is None else obtained
    if not (0 <= now < LATEST and 0 <= came < LATEST):
        raise EvidenceError("a time is Unix seconds between 1970 and the year 9999")
    checks = Checks()
    checks.that("policy", bool(policy.require), expected="a requirement", found=f"{len(policy.require)} of them")  # 1
    checks.that("nonce", len(nonce) == NONCE_BYTES, expected=f"{NONCE_BYTES} bytes", found=nonce)
    kinds = tuple(part.kind for part in evidence.each)
    _check_requirements(kinds, policy, checks)  # 2
    gpus = []
    for index, part in enumerate(evidence.each):  # 3
        label = f"{part.kind}[{index}]" if kinds.count(part.kind) > 1 else part.kind
        gpus.append(_check_part(part, policy, report_data, now, checks.under(label), roots))
    if policy.nvidia is not None and any(gpus):
        checks.at_least("gpus", len({key for key in gpus if key}), policy.nvidia.count)
    _check_claims(claims, policy.claims, checks.under("claims"))  # 4
    _check_time(policy, now, came, checks)  # 5
    if checks.failed:
        raise VerificationFailed(_message(checks), checks.all)
    return Verified(claims, kinds, policy.digest, report_data, nonce, now, policy.expires(came), checks.all)


def _message(checks: Checks) -> str:
    failed = checks.failed
    more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
    first = failed[0]
    return f"{first.name}: expected {first.expected}, found {first.found}{more} ({len(checks.all)} checks)"


def _check_requirements(kinds: tuple[str, ...], policy: Policy, checks: Checks) -> None:
    required = {kind for alternatives in policy.require for kind in alternatives}
    for kind in dict.fromkeys(kinds):
        checks.that(f"kind.{kind}", kind in required, expected=" or ".join(sorted(required)), found=kind)
        if kind != "nvidia" and kinds.count(kind) > 1:
            checks.that(f"once.{kind}", False, expected="one part of this kind", found=kinds.count(kind))
    for alternatives in policy.require:
        met = sorted(set(alternatives) & set(kinds))
        wanted = " or ".join(alternatives)
        checks.that(f"require.{'|'.join(alternatives)}", bool(met), expected=wanted, found=", ".join(met))


def _check_claims(claims: Claims, policy: ClaimsPolicy, checks: Checks) -> None:
    """What the policy did not foresee fails."""
    checks.one_of("configuration", claims.configuration, policy.configuration)
    checks.measured("software", bytes.fromhex(claims.software.digest), policy.software)
    checks.that(
        "arguments",
        claims.arguments in policy.arguments,
        expected=" or ".join(repr(list(it)) for it in policy.arguments),
        found=list(claims.arguments),
    )
    for variable, value in claims.environment.items():
        allowed = policy.environment.get(variable, ())
        checks.one_of(f"environment.{shown(variable)}", value, allowed)
    if not claims.environment:
        checks.that("environment", True, expected="nothing unforeseen", found="")
    for name, keys, trusted in (
        ("workers", claims.workers, policy.workers),
        ("mask_workers", claims.mask_workers, policy.mask_workers),
    ):
        unknown = () if trusted == ANY else tuple(key for key in keys if key not in trusted)
        checks.that(name, not unknown, expected=_keys(trusted), found=_keys(unknown or keys))
    both = tuple(sorted(set(claims.workers) & set(claims.mask_workers)))
    checks.that("parties", not both, expected="no key that is both a worker's and a mask worker's", found=_keys(both))
    least = PROFILES.index(policy.least_profile)
    checks.that(
        "profile",
        PROFILES.index(claims.profile) >= least,
        expected=" or ".join(PROFILES[least:]),
        found=claims.profile,
    )


def _keys(keys: tuple[str, ...]) -> str:
    return ", ".join(keys) or "none"


def _check_time(policy: Policy, now: int, obtained: int, checks: Checks) -> None:
    age = now - obtained
    limit = policy.freshness_seconds
    checks.that("freshness", 0 <= age <= limit, expected=f"at most {limit} s old", found=f"{age} s old")
    reference = policy.reference_values
    if reference is not None and reference.expires is not None:
        left = reference.expires - now
        found = f"{left} s left; sequence {reference.sequence}, signed by {reference.signer}"
        checks.that("reference_values", left >= 0, expected="not expired", found=found)


def _check_part(part: Evidence, policy: Policy, report_data: bytes, now: int, checks: Checks, roots: Roots) -> str:
    """Hold one part of the evidence against the section of its kind.

    Returns:
        The public key of a GPU, in hex; of other kinds nothing.
    """
    if part.kind == "tdx" and policy.tdx is not None:
        check_tdx(part, policy.tdx, report_data=report_data, now=now, checks=checks)
    elif part.kind == "sgx" and policy.sgx is not None:
        check_sgx(part, policy.sgx, report_data=report_data, now=now, checks=checks)
    elif part.kind == "sev-snp" and policy.sev_snp is not None:
        check_snp(part, policy.sev_snp, report_data=report_data, now=now, checks=checks, roots=roots.amd)
    elif part.kind == "nvidia" and policy.nvidia is not None:
        return check_nvidia(part, policy.nvidia, report_data=report_data, now=now, checks=checks, root=roots.nvidia)
    elif part.kind == "tpm" and policy.tpm is not None:
        check_tpm(part, policy.tpm, report_data=report_data, checks=checks)
    elif part.kind == "simulated" and policy.simulated is not None:
        allowed = policy.allow_simulated
        check_simulated(part, policy.simulated, allowed=allowed, report_data=report_data, checks=checks)
    return ""  # without a section nothing requires it, and `_check_requirements` has refused it
