"""Reports of NVIDIA Hopper GPUs: SPDM 1.1 measurements (DMTF DSP0274, section 10.11), signed by the GPU's own key.

    1. The structure: GET_MEASUREMENTS, MEASUREMENTS, measurement blocks, opaque fields.
    2. The certificates, from the GPU's key up to NVIDIA's pinned root.
    3. The signature over request and answer.
    4. The nonce, which stands for the report data; the firmware that the key belongs to.
    5. What the policy says of driver, VBIOS and measurements.

What is not checked: whether NVIDIA revoked a certificate (OCSP), and its reference manifests (RIM). A policy names
versions and measurements itself, or takes them from signed reference values.
"""

import hashlib
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from obfuscatune.attest.checks import Checks
from obfuscatune.attest.der import OCTET_STRING, SEQUENCE, read, read_certificate
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.fields import Reader, ecdsa_verifies
from obfuscatune.attest.policy import NvidiaPolicy
from obfuscatune.errors import EvidenceError

ROOT = "a90c4eb5acfd3e3d03a25db6a26b84f720ad0503196c627c21ddd48dd85b06a4"
"""SHA-256 of the SubjectPublicKeyInfo of NVIDIA's Device Identity CA."""
MOST_REPORT_BYTES = 64 * 1024
_REQUEST_BYTES, _SIGNATURE_BYTES, _NONCE_BYTES = 37, 96, 32
_SPDM_1_1, _GET_MEASUREMENTS, _MEASUREMENTS = 0x11, 0xE0, 0x60
_DMTF = 1
_DRIVER, _VBIOS, _FWID = 3, 6, 20
"""Types of opaque fields."""
_DICE_DEVICE_ID = "2.23.133.5.4.1"


@dataclass(frozen=True)
class Report:
    """A request and its answer."""

    nonce: bytes
    """Of the request."""
    measurements: dict[int, bytes]
    opaque: dict[int, bytes]
    signed_bytes: bytes
    signature: bytes

    @property
    def driver_version(self) -> str:
        """As NVIDIA's tools print it: 550.90.07."""
        return self.opaque.get(_DRIVER, b"").rstrip(b"\0").decode("ascii", "replace")

    @property
    def vbios_version(self) -> str:
        """As NVIDIA's tools print it: 96.00.9f.00.01."""
        field = self.opaque.get(_VBIOS, b"")
        return ".".join(f"{byte:02x}" for byte in (*reversed(field[:4]), *field[4:5]))


def gpu_nonce(report_data: bytes) -> bytes:
    """The nonce that a GPU's report must carry: 32 bytes that stand for the report data."""
    return hashlib.sha256(b"obfuscatune/attest/v1/gpu" + report_data).digest()


def check_nvidia(
    evidence: Evidence, policy: NvidiaPolicy, *, report_data: bytes, now: int, checks: Checks, root: str = ROOT
) -> str:
    """Check the report of one GPU.

    Args:
        evidence: The report, with the certificates from the GPU's key to the root.
        policy: What is accepted.
        report_data: 64 bytes whose `gpu_nonce` the report must carry.
        now: Unix seconds.
        checks: Where the checks are added.
        root: SHA-256 of the root's public key.

    Returns:
        SHA-256 of the GPU's own public key, in hex.

    Raises:
        EvidenceError: it is no report, or the certificates are none.
    """
    report = parse_report(evidence.quote)  # 1
    certificates = _read_certificates(evidence.certificates)
    leaf = certificates[0]
    if not isinstance(key := leaf.public_key(), ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EvidenceError("nvidia: the GPU's public key is not one of P-384")
    _check_chain(certificates, root, now, checks)  # 2
    half = _SIGNATURE_BYTES // 2
    r, s = (int.from_bytes(part, "big") for part in (report.signature[:half], report.signature[half:]))
    checks.signed(ecdsa_verifies(key, r, s, report.signed_bytes, SHA384()), by="the GPU's key")  # 3
    checks.equal("nonce", report.nonce.hex(), gpu_nonce(report_data).hex())  # 4
    checks.equal("firmware_id", report.opaque.get(_FWID, b"").hex(), _firmware_id(leaf).hex())
    checks.one_of("driver_version", report.driver_version, policy.driver_versions)  # 5
    checks.one_of("vbios_version", report.vbios_version, policy.vbios_versions)
    for index, allowed in policy.measurements.items():
        checks.measured(f"measurement.{index}", report.measurements.get(int(index), b""), allowed)
    return _fingerprint(leaf)


def parse_report(data: bytes) -> Report:
    """Read a request and its answer, as the driver returns them; it may add one zero byte.

    Raises:
        EvidenceError: they are none.
    """
    if len(data) > MOST_REPORT_BYTES:
        raise EvidenceError(f"nvidia: a report of {len(data):,} bytes; at most {MOST_REPORT_BYTES:,} are read")
    reader = Reader(data, "nvidia: the report")
    request = reader.take(_REQUEST_BYTES)
    answer = reader.take(8)
    if request[:2] != bytes([_SPDM_1_1, _GET_MEASUREMENTS]) or answer[:2] != bytes([_SPDM_1_1, _MEASUREMENTS]):
        raise EvidenceError("nvidia: no GET_MEASUREMENTS and MEASUREMENTS of SPDM 1.1")
    record = reader.take(int.from_bytes(answer[5:8], "little"))
    reader.take(_NONCE_BYTES)  # the GPU's own
    opaque = reader.sized("<H")
    end = reader.at
    signature = reader.take(_SIGNATURE_BYTES)
    if reader.rest not in (b"", b"\0"):
        raise EvidenceError("nvidia: bytes behind the signature")
    return Report(request[4:36], _read_blocks(record, answer[4]), _read_opaque(opaque), data[:end], signature)


def _read_blocks(record: bytes, count: int) -> dict[int, bytes]:
    reader, found = Reader(record, "nvidia: the record of measurements"), {}
    for _ in range(count):
        index, specification = reader.unpack("<BB")
        block = Reader(reader.sized("<H"), f"nvidia: the measurement block {index}")
        block.take(1)  # the type of the measurement
        value = block.sized("<H")
        if specification != _DMTF or block.rest or index in found:
            raise EvidenceError(f"nvidia: the measurement block {index} is malformed, or there twice")
        found[index] = value
    reader.end()
    return found


def _read_opaque(data: bytes) -> dict[int, bytes]:
    reader, found = Reader(data, "nvidia: the opaque fields"), {}
    while reader.rest:
        (kind,) = reader.unpack("<H")
        if kind in found:
            raise EvidenceError(f"nvidia: the opaque field {kind} is there twice")
        found[kind] = reader.sized("<H")
    return found


def _read_certificates(certificates: tuple[bytes, ...]) -> list[x509.Certificate]:
    if len(certificates) < 2:
        raise EvidenceError("nvidia: expected the certificates from the GPU's key to the root")
    try:
        return [_read_certificate(certificate) for certificate in certificates]
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension) as error:
        raise EvidenceError(f"nvidia: a certificate cannot be read: {error}") from error


def _read_certificate(data: bytes) -> x509.Certificate:
    """A certificate whose fields were all read once, since `cryptography` reads each when it is first asked for."""
    if read_certificate(data, "nvidia: certificate").serial <= 0:
        raise EvidenceError("nvidia: a certificate whose serial number is not positive")
    certificate = x509.load_der_x509_certificate(data)
    _ = certificate.public_key(), certificate.extensions, certificate.subject, certificate.issuer
    return certificate


def _check_chain(certificates: list[x509.Certificate], root: str, now: int, checks: Checks) -> None:
    last = certificates[-1]
    checks.equal("root", _fingerprint(last), root)
    issuers = [*certificates[1:], last]
    for index, (certificate, issuer) in enumerate(zip(certificates, issuers, strict=True)):
        issued = _is_issued(certificate, issuer)
        name = issuer.subject.rfc4514_string()
        checks.that(f"chain.{index}", issued, expected=f"signed by {name}", found=certificate.subject.rfc4514_string())
        begin, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
        checks.within(f"valid.{index}", now, begin, end)


def _is_issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        is_authority = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return False
    return is_authority


def _firmware_id(leaf: x509.Certificate) -> bytes:
    """The FWID of the TCG's DICE device id: SEQUENCE { version, key, SEQUENCE { algorithm, FWID } }."""
    try:
        extension = leaf.extensions.get_extension_for_oid(x509.ObjectIdentifier(_DICE_DEVICE_ID)).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise EvidenceError("nvidia: the GPU's certificate names no firmware (FWID)") from error
    if not isinstance(extension, x509.UnrecognizedExtension):
        raise EvidenceError("nvidia: the GPU's certificate names no firmware (FWID)")
    what = "nvidia: FWID"
    items = read(extension.value, what).expect(SEQUENCE, what).items()
    fields = items[2].expect(SEQUENCE, what).items() if len(items) == 3 else []
    if len(fields) != 2:
        raise EvidenceError(f"{what}: expected a version, a key and the identifier")
    return fields[1].expect(OCTET_STRING, what).content


def _fingerprint(certificate: x509.Certificate) -> str:
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).hexdigest()
