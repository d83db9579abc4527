"""Simulated evidence, for development and demonstrations: a document of the same layout, signed by an Ed25519 key.

It proves that somebody holds that key, and nothing about where a program runs. It is refused unless a policy says
`allow_simulated: true` and names the key.
"""

from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from obfuscatune.attest.checks import Checks
from obfuscatune.attest.evidence import Evidence, check_report_data
from obfuscatune.documents import canonical, is_hex, parse, sign, verify
from obfuscatune.errors import EvidenceError, IntegrityError

if TYPE_CHECKING:
    from obfuscatune.attest.policy import SimulatedPolicy

WARNING = "SIMULATED: proves nothing"
"""Shown wherever simulated evidence appears."""
PURPOSE = "simulated-evidence"
_MEASUREMENT_BYTES = 48
_MOST_QUOTE_BYTES = 4096


class Simulated:
    """Gives simulated evidence.

    Args:
        key: Signs it.
        measurement: 48 bytes in hex, what a launch digest would be.
    """

    def __init__(self, key: Ed25519PrivateKey, measurement: str = "00" * _MEASUREMENT_BYTES) -> None:
        if not is_hex(measurement, _MEASUREMENT_BYTES):
            raise EvidenceError("a simulated measurement is 48 bytes in lower-case hex")
        self._key, self._measurement = key, measurement

    def attest(self, report_data: bytes) -> Evidence:
        """Evidence over 64 bytes."""
        document = {
            "version": 1,
            "warning": WARNING,
            "measurement": self._measurement,
            "report_data": check_report_data(report_data).hex(),
        }
        return Evidence("simulated", canonical(sign(document, PURPOSE, self._key)))


def check_simulated(
    evidence: Evidence, policy: "SimulatedPolicy", *, allowed: bool, report_data: bytes, checks: Checks
) -> None:
    """Check simulated evidence.

    Raises:
        EvidenceError: the quote is no document of this kind.
    """
    checks.that(
        "allowed", allowed, expected="allow_simulated: true in the policy", found="it" if allowed else "no such line"
    )
    signed = _parse(evidence)
    signed_by = signed["key"] if isinstance(signed.get("key"), str) else ""
    if not checks.one_of("key", signed_by, policy.keys):
        return
    try:
        document = verify(signed, PURPOSE, set(policy.keys))
    except IntegrityError as error:
        checks.that("signature", False, expected="by that key", found=error)
        return
    checks.that("signature", True, expected="by that key", found=f"valid; {WARNING}")
    if set(document) != {"version", "warning", "measurement", "report_data"} or document["version"] != 1:
        raise EvidenceError("simulated evidence has a version, warning, measurement and report data")
    checks.equal("report_data", document["report_data"], report_data.hex())
    if not is_hex(document["measurement"], _MEASUREMENT_BYTES):
        raise EvidenceError("simulated evidence: a measurement is 48 bytes in lower-case hex")
    checks.measured("measurement", bytes.fromhex(document["measurement"]), policy.measurement)


def _parse(evidence: Evidence) -> dict[str, Any]:
    try:
        return parse(evidence.quote, most_bytes=_MOST_QUOTE_BYTES)
    except IntegrityError as error:
        raise EvidenceError(f"simulated evidence: {error}") from error
