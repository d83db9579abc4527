"""AMD's certificates: from the key that signed a report up to a pinned root, and what they say of the processor."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import load_der_public_key

from obfuscatune.attest.checks import Checks
from obfuscatune.attest.der import (
    INTEGER,
    Certificate,
    Signed,
    Value,
    integer,
    read,
    read_certificate,
    read_revocation_list,
)
from obfuscatune.errors import EvidenceError

Product = Literal["Milan", "Genoa", "Turin"]

ROOTS: Mapping[str, Product] = {
    "9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9": "Milan",
    "429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831": "Genoa",
    "4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08": "Turin",
}
"""SHA-256 of the SubjectPublicKeyInfo of each AMD Root Key (ARK). Genoa's is that of Bergamo and Siena as well."""

_BY_GENOA_ROOT = {"Bergamo": "Genoa", "Siena": "Genoa"}
_RSA_PSS = "1.2.840.113549.1.1.10"
_ARC = "1.3.6.1.4.1.3704.1"
_PRODUCT, _HWID, _CSP = f"{_ARC}.2", f"{_ARC}.4", f"{_ARC}.5"
_TCB = {
    "bootloader": f"{_ARC}.3.1",
    "tee": f"{_ARC}.3.2",
    "snp": f"{_ARC}.3.3",
    "microcode": f"{_ARC}.3.8",
    "fmc": f"{_ARC}.3.9",
}
_IA5_STRING, _UTF8_STRING = 0x16, 0x0C


@dataclass(frozen=True)
class Chip:
    """What a certificate says of the processor whose key it certifies."""

    product: Product
    kind: Literal["vcek", "vlek"]
    key: ec.EllipticCurvePublicKey
    tcb: Mapping[str, int]
    """Security version numbers of the firmware that the key was derived from."""
    hardware_id: bytes
    """Empty for a VLEK, which is a cloud provider's key and no chip's."""
    csp: str
    """The cloud provider; empty for a VCEK."""


def check_chain(
    certificates: tuple[bytes, ...],
    crl: bytes | None,
    now: int,
    checks: Checks,
    roots: Mapping[str, Product],
) -> Chip | None:
    """Check the chain VCEK or VLEK, ASK or ASVK, ARK.

    Returns:
        What the leaf says; None if it does not chain to a pinned root.

    Raises:
        EvidenceError: these are no three certificates.
    """
    if len(certificates) != 3:
        raise EvidenceError(f"sev-snp: expected the certificates VCEK or VLEK, ASK and ARK, found {len(certificates)}")
    leaf, intermediate, root = (
        read_certificate(it, f"sev-snp: {what}")
        for it, what in zip(certificates, ("VCEK or VLEK", "ASK", "ARK"), strict=True)
    )
    fingerprint = hashlib.sha256(root.public_key).hexdigest()
    product = roots.get(fingerprint)
    known = " or ".join(sorted(set(roots.values())))
    if not checks.that("root", product is not None, expected=f"ARK of {known}", found=product or fingerprint):
        return None
    links = (("root", root, root), ("intermediate", intermediate, root), ("leaf", leaf, intermediate))
    signed = True
    for what, issued, by in links:
        signed = signed and _is_issued(issued, by)  # a key is used once it is certified itself
        checks.that(f"chain.{what}", signed, expected=f"signed by {by.common_name}", found=issued.common_name)
    for what, it in (("leaf", leaf), ("intermediate", intermediate), ("root", root)):
        checks.within(f"valid.{what}", now, it.not_before, it.not_after)
    if crl is not None:
        _check_crl(crl, root, intermediate, now, checks)
    if not signed or product is None:
        return None
    return _chip(leaf, intermediate, product, checks)


def verifies(signed: Signed, by: bytes) -> bool:
    """Whether a key (SubjectPublicKeyInfo) signed this by RSA-PSS with SHA-384, AMD's only way."""
    try:
        key = load_der_public_key(by)
        if not isinstance(key, rsa.RSAPublicKey) or signed.algorithm != _RSA_PSS:
            return False
        key.verify(
            signed.signature, signed.signed_bytes, padding.PSS(padding.MGF1(SHA384()), SHA384.digest_size), SHA384()
        )
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


def _is_issued(certificate: Certificate, by: Certificate) -> bool:
    return certificate.issuer == by.subject and by.is_authority and verifies(certificate.signed, by.public_key)


def _check_crl(crl: bytes, root: Certificate, intermediate: Certificate, now: int, checks: Checks) -> None:
    found = read_revocation_list(crl, "sev-snp: revocation list")
    genuine = found.issuer == root.subject and verifies(found.signed, root.public_key)
    checks.that("crl.signature", genuine, expected=f"by {root.common_name}", found="that" if genuine else "another")
    checks.within("crl.current", now, found.this_update, found.next_update)
    revoked = intermediate.serial in found.serials
    checks.that("crl.revoked", not revoked, expected="not revoked", found="revoked" if revoked else "not revoked")


def _chip(leaf: Certificate, intermediate: Certificate, product: Product, checks: Checks) -> Chip | None:
    is_vlek = _CSP in leaf.extensions
    kind: Literal["vcek", "vlek"] = "vlek" if is_vlek else "vcek"
    names = (f"SEV-{kind.upper()}", f"SEV-VLEK-{product}" if is_vlek else f"SEV-{product}")
    checks.equal("names", ", ".join((leaf.common_name, intermediate.common_name)), ", ".join(names))
    stated = _text(leaf, _PRODUCT).partition("-")[0]  # "Milan-B0": product and stepping
    checks.equal("product", _BY_GENOA_ROOT.get(stated, stated), product)
    try:
        key = load_der_public_key(leaf.public_key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EvidenceError("sev-snp: the leaf's public key cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EvidenceError("sev-snp: the leaf's public key is not one of P-384")
    return Chip(
        product=product,
        kind=kind,
        key=key,
        tcb={name: _number(leaf, oid) for name, oid in _TCB.items() if name != "fmc" or product == "Turin"},
        hardware_id=b"" if is_vlek else _bytes(leaf, _HWID),
        csp=_text(leaf, _CSP) if is_vlek else "",
    )


def _bytes(leaf: Certificate, oid: str) -> bytes:
    found = leaf.extensions.get(oid)
    if found is None:
        raise EvidenceError(f"sev-snp: the certificate lacks the extension {oid}")
    return found


def _number(leaf: Certificate, oid: str) -> int:
    found = integer(read(_bytes(leaf, oid), oid).expect(INTEGER, oid), oid)
    if not 0 <= found <= 255:
        raise EvidenceError(f"sev-snp: the extension {oid} is {found}, and no byte")
    return found


def _text(leaf: Certificate, oid: str) -> str:
    found: Value = read(_bytes(leaf, oid), oid)
    if found.tag not in (_IA5_STRING, _UTF8_STRING):
        raise EvidenceError(f"sev-snp: the extension {oid} is no text")
    return found.content.decode("ascii", "replace")
