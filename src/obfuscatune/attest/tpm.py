"""TPM 2.0 quotes (TCG TPM 2.0 Library, part 2, section 10.12), signed by an ECC attestation key.

A TPM tells which software booted. It hides nothing from whoever owns the machine, so a policy that requires no more
than this trusts the operator. Beside a TEE it adds the measurements of the boot.

    quote         u16 length of TPMS_ATTEST, TPMS_ATTEST, TPMT_SIGNATURE
    certificates  one: the SubjectPublicKeyInfo of the attestation key
    collateral    pcr.0 ... pcr.23: the values quoted, in hex
"""

import hashlib
from collections.abc import Mapping

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from obfuscatune.attest.checks import Checks
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.fields import Reader, ecdsa_verifies
from obfuscatune.attest.policy import TpmPolicy
from obfuscatune.errors import EvidenceError

MOST_QUOTE_BYTES = 4096
PCRS = 24
_GENERATED = 0xFF544347
"""TPM_GENERATED_VALUE: a TPM signs no data from outside that begins so."""
_ATTEST_QUOTE = 0x8018
_SHA256, _ECDSA = 0x000B, 0x0018


def tpm_nonce(report_data: bytes) -> bytes:
    """The qualifying data that a quote must carry: 32 bytes that stand for the report data, since a TPM takes no 64."""
    return hashlib.sha256(b"obfuscatune/attest/v1/tpm" + report_data).digest()


def check_tpm(evidence: Evidence, policy: TpmPolicy, *, report_data: bytes, checks: Checks) -> None:
    """Check a TPM quote.

    Raises:
        EvidenceError: it is none.
    """
    if len(evidence.certificates) != 1:
        raise EvidenceError("tpm: expected one public key, that of the attestation key")
    spki = evidence.certificates[0]
    if not checks.one_of("attestation_key", hashlib.sha256(spki).hexdigest(), policy.attestation_keys):
        return
    attest, r, s = _split(evidence.quote)
    checks.signed(_verifies(spki, attest, r, s), by="the attestation key")
    nonce, selected, digest = _parse_attest(attest)
    checks.equal("nonce", nonce.hex(), tpm_nonce(report_data).hex())
    values = _values(evidence.collateral, selected)
    checks.equal("pcr_digest", digest.hex(), hashlib.sha256(b"".join(values.values())).hexdigest())
    for index, allowed in policy.pcrs.items():
        checks.measured(f"pcr.{index}", values.get(int(index), b""), allowed)


def _split(quote: bytes) -> tuple[bytes, int, int]:
    """TPMS_ATTEST, and r and s of the signature."""
    if len(quote) > MOST_QUOTE_BYTES:
        raise EvidenceError(f"tpm: a quote of {len(quote):,} bytes; at most {MOST_QUOTE_BYTES:,} are read")
    reader = Reader(quote, "tpm: the quote")
    attest = reader.sized(">H")
    if reader.unpack(">HH") != (_ECDSA, _SHA256):
        raise EvidenceError("tpm: expected a signature by ECDSA with SHA-256")
    r, s = (int.from_bytes(reader.sized(">H"), "big") for _ in range(2))
    reader.end()
    return attest, r, s


def _parse_attest(attest: bytes) -> tuple[bytes, list[int], bytes]:
    """Qualifying data, the PCRs selected, and the digest of their values."""
    reader = Reader(attest, "tpm: what was attested")
    magic, kind = reader.unpack(">IH")
    if magic != _GENERATED or kind != _ATTEST_QUOTE:
        raise EvidenceError("tpm: no quote that a TPM made")
    reader.sized(">H")  # name of the key that signed
    nonce = reader.sized(">H")
    reader.take(17 + 8)  # clock, resets, restarts, safe; firmware version
    (banks,) = reader.unpack(">I")
    if banks != 1:
        raise EvidenceError(f"tpm: expected one bank of PCRs, found {banks}")
    algorithm, size = reader.unpack(">HB")
    if algorithm != _SHA256 or size * 8 > 32:
        raise EvidenceError("tpm: expected the bank of SHA-256")
    bits = int.from_bytes(reader.take(size), "little")
    digest = reader.sized(">H")
    reader.end()
    return nonce, [index for index in range(size * 8) if bits >> index & 1], digest


def _values(collateral: Mapping[str, str], selected: list[int]) -> dict[int, bytes]:
    """The values of the PCRs selected, in their order. The digest says whether they are those."""
    try:
        return {index: bytes.fromhex(collateral[f"pcr.{index}"]) for index in selected}
    except KeyError as error:
        raise EvidenceError(f"tpm: the quote selects {error}, and the evidence has no value of it") from error
    except ValueError as error:
        raise EvidenceError("tpm: values of PCRs are hex") from error


def _verifies(spki: bytes, attest: bytes, r: int, s: int) -> bool:
    try:
        key = load_der_public_key(spki)
    except (UnsupportedAlgorithm, ValueError):
        return False
    return isinstance(key, ec.EllipticCurvePublicKey) and ecdsa_verifies(key, r, s, attest, SHA256())
