"""Evidence that tests make themselves: a manufacturer's chain, a processor's report, a GPU's report."""

from __future__ import annotations

import datetime
import hashlib
import struct
from dataclasses import dataclass, replace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from obfuscatune.attest.binding import Binding
from obfuscatune.attest.claims import Claims, Software
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.nvidia import gpu_nonce
from obfuscatune.attest.policy import Policy

NOW = 1_790_000_000
"""In 2026: the time at which what is made here is valid."""
CLAIMS = Claims(
    Software("obfuscatune", "0.1.0", "11" * 32),
    configuration="22" * 32,
    http_key="33" * 32,
    hpke_key="44" * 32,
    signing_key="55" * 32,
    boot="66" * 32,
    arguments=("serve", "--config", "service.yaml"),
    environment={"OMP_NUM_THREADS": "1"},
    workers=("77" * 32,),
    mask_workers=("88" * 32,),
)
BINDING = Binding(b"\1" * 32, b"\2" * 32, b"\3" * 32, b"\4" * 32)
REPORT_DATA = BINDING.report_data(CLAIMS)
KEY = Ed25519PrivateKey.from_private_bytes(b"\7" * 32)
CLAIMS_POLICY = {
    "configuration": ["22" * 32],
    "arguments": [["serve", "--config", "service.yaml"]],
    "environment": {"OMP_NUM_THREADS": ["1", "2"]},
    "workers": ["77" * 32],
    "mask_workers": ["88" * 32],
}


def public_hex(key: Ed25519PrivateKey = KEY) -> str:
    return key.public_key().public_bytes_raw().hex()


def simulated_policy(**changes: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "require": [["simulated"]],
        "allow_simulated": True,
        "simulated": {"keys": [public_hex()], "measurement": ["00" * 48]},
        "claims": CLAIMS_POLICY,
    } | changes


def policy(**changes: Any) -> Policy:
    return Policy.from_document(simulated_policy(**changes))


def fingerprint(key: Any) -> str:
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def certificate(
    key: Any,
    name: str,
    signer: Any,
    issuer: str,
    *,
    authority: bool = False,
    extensions: dict[str, bytes] | None = None,
    days: int = 3650,
) -> bytes:
    """A certificate as DER; signed by RSA-PSS where the signer's key is RSA."""
    start = datetime.datetime.fromtimestamp(NOW, datetime.UTC) - datetime.timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    for oid, value in (extensions or {}).items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
    pss = padding.PSS(padding.MGF1(SHA384()), 48) if isinstance(signer, rsa.RSAPrivateKey) else None
    return builder.sign(signer, SHA384(), rsa_padding=pss).public_bytes(Encoding.DER)


@dataclass(frozen=True)
class Amd:
    """A root of AMD's kind, and processors beneath it."""

    product: str
    root: rsa.RSAPrivateKey
    intermediate: rsa.RSAPrivateKey
    chip: ec.EllipticCurvePrivateKey
    tcb: tuple[int, int, int, int, int] = (1, 4, 0, 22, 72)
    """fmc, bootloader, tee, snp, microcode: what the key is certified for."""

    @classmethod
    def make(cls, product: str) -> Amd:
        keys = [rsa.generate_private_key(65537, 2048) for _ in range(2)]
        return cls(product, keys[0], keys[1], ec.generate_private_key(ec.SECP384R1()))

    @property
    def roots(self) -> dict[str, Any]:
        return {fingerprint(self.root): self.product}

    @property
    def hardware_id(self) -> bytes:
        return bytes(range(8 if self.product == "Turin" else 64))

    def certificates(
        self, *, vlek: bool = False, product: str | None = None, middle: str | None = None
    ) -> tuple[bytes, bytes, bytes]:
        """The chain; with another product in the leaf, or another name of the intermediate, where they are given."""
        root = f"ARK-{self.product}"
        middle = middle or (f"SEV-VLEK-{self.product}" if vlek else f"SEV-{self.product}")
        arc = "1.3.6.1.4.1.3704.1"
        fmc, bootloader, tee, snp, microcode = self.tcb
        numbers = {f"{arc}.3.1": bootloader, f"{arc}.3.2": tee, f"{arc}.3.3": snp, f"{arc}.3.8": microcode}
        if self.product == "Turin":
            numbers[f"{arc}.3.9"] = fmc
        stated = (product or self.product).encode()
        extensions = {f"{arc}.2": b"\x16" + bytes([len(stated)]) + stated}
        extensions |= {oid: _integer(number) for oid, number in numbers.items()}
        extensions |= {f"{arc}.5": b"\x16\x03csp"} if vlek else {f"{arc}.4": self.hardware_id}
        leaf = "SEV-VLEK" if vlek else "SEV-VCEK"
        return (
            certificate(self.chip, leaf, self.intermediate, middle, extensions=extensions),
            certificate(self.intermediate, middle, self.root, root, authority=True),
            certificate(self.root, root, self.root, root, authority=True),
        )

    def tcb_bytes(self, tcb: tuple[int, int, int, int, int] | None = None) -> bytes:
        fmc, bootloader, tee, snp, microcode = tcb or self.tcb
        if self.product == "Turin":
            return bytes([fmc, bootloader, tee, snp, 0, 0, 0, microcode])
        return bytes([bootloader, tee, 0, 0, 0, 0, snp, microcode])

    def report(
        self, report_data: bytes = REPORT_DATA, *, vlek: bool = False, changes: dict[int, bytes] | None = None
    ) -> bytes:
        """A signed report; `changes` are made before it is signed."""
        report = bytearray(1184)
        cpuid = {"Milan": (0x19, 0x01), "Genoa": (0x19, 0x11), "Turin": (0x1A, 0x02)}[self.product]
        fields = {
            0x00: struct.pack("<II", 3, 7),
            0x08: struct.pack("<Q", 1 << 17),
            0x34: struct.pack("<I", 1),
            0x38: self.tcb_bytes(),
            0x48: struct.pack("<I", vlek << 2),
            0x50: report_data,
            0x90: b"\x99" * 48,
            0x180: self.tcb_bytes(),
            0x188: bytes(cpuid),
            0x1A0: b"" if vlek else self.hardware_id,
            0x1E0: self.tcb_bytes(),
            0x1F0: self.tcb_bytes(),
        }
        for offset, value in (fields | (changes or {})).items():
            report[offset : offset + len(value)] = value
        r, s = decode_dss_signature(self.chip.sign(bytes(report[:672]), ec.ECDSA(SHA384())))
        report[672:720], report[744:792] = r.to_bytes(48, "little"), s.to_bytes(48, "little")
        return bytes(report)

    def evidence(self, report: bytes | None = None, *, vlek: bool = False) -> Evidence:
        return Evidence("sev-snp", self.report(vlek=vlek) if report is None else report, self.certificates(vlek=vlek))

    def crl(self, *serials: int, days: int = 30) -> bytes:
        start = datetime.datetime.fromtimestamp(NOW, datetime.UTC) - datetime.timedelta(days=1)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(_name(f"ARK-{self.product}"))
            .last_update(start)
            .next_update(start + datetime.timedelta(days=days))
        )
        for serial in serials:
            revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(start).build()
            builder = builder.add_revoked_certificate(revoked)
        signed = builder.sign(self.root, SHA384(), rsa_padding=padding.PSS(padding.MGF1(SHA384()), 48))
        return signed.public_bytes(Encoding.DER)


SNP_POLICY = {
    "measurement": ["99" * 48],
    "minimum_tcb": {"fmc": 1, "bootloader": 4, "tee": 0, "snp": 22, "microcode": 72},
}


@dataclass(frozen=True)
class Gpu:
    """A root of NVIDIA's kind, and one GPU beneath it."""

    root: ec.EllipticCurvePrivateKey
    key: ec.EllipticCurvePrivateKey
    firmware_id: bytes = b"\xab" * 48

    @classmethod
    def make(cls) -> Gpu:
        return cls(ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1()))

    def another(self) -> Gpu:
        return replace(self, key=ec.generate_private_key(ec.SECP384R1()))

    def certificates(self) -> tuple[bytes, bytes]:
        fwid = _sequence(_tlv(0x06, bytes.fromhex("608648016503040202")), _tlv(0x04, self.firmware_id))
        device = _sequence(_tlv(0x02, b"\1"), _sequence(), fwid)
        leaf = certificate(self.key, "GPU", self.root, "root", extensions={"2.23.133.5.4.1": device})
        return leaf, certificate(self.root, "root", self.root, "root", authority=True)

    def report(self, report_data: bytes = REPORT_DATA, *, firmware_id: bytes | None = None) -> bytes:
        block = struct.pack("<BBH", 1, 1, 51) + struct.pack("<BH", 0, 48) + b"\x11" * 48
        opaque = b"".join(
            struct.pack("<HH", kind, len(value)) + value
            for kind, value in (
                (3, b"550.90.07\0"),
                (6, bytes.fromhex("009f009601000000")),
                (20, firmware_id or self.firmware_id),
            )
        )
        request = bytes([0x11, 0xE0, 1, 0xFF]) + gpu_nonce(report_data) + b"\0"
        answer = bytes([0x11, 0x60, 0, 0, 1]) + len(block).to_bytes(3, "little") + block + bytes(32)
        signed = request + answer + struct.pack("<H", len(opaque)) + opaque
        r, s = decode_dss_signature(self.key.sign(signed, ec.ECDSA(SHA384())))
        return signed + r.to_bytes(48, "big") + s.to_bytes(48, "big")

    def evidence(self, report: bytes | None = None) -> Evidence:
        return Evidence("nvidia", self.report() if report is None else report, self.certificates())


NVIDIA_POLICY = {
    "driver_versions": ["550.90.07"],
    "vbios_versions": ["96.00.9f.00.01"],
    "measurements": {"1": ["11" * 48]},
}


def _integer(number: int) -> bytes:
    return _tlv(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _sequence(*items: bytes) -> bytes:
    return _tlv(0x30, b"".join(items))


def _tlv(tag: int, content: bytes) -> bytes:
    return bytes([tag, len(content)]) + content
