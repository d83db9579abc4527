"""A certificate authority, a certificate log and a transparency log of our own, in sigstore's formats.

What Fulcio and Rekor (version 1) do for whoever signs: a certificate for ten minutes with the signer's identity, which
a certificate log has; and an entry of the signature in a Merkle tree whose head the log signs.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

Key = ec.EllipticCurvePrivateKey
NOW = datetime.datetime(2026, 11, 29, 12, tzinfo=datetime.UTC)
MINUTES = datetime.timedelta(minutes=1)
IDENTITY = "https://github.com/example/release/.github/workflows/release.yml@refs/tags/v1"
ISSUER = "https://token.actions.githubusercontent.com"
_ISSUER_OID = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_SCT_OID = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_NAME = x509.Name(
    [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "tests"), x509.NameAttribute(NameOID.COMMON_NAME, "ca")]
)


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def spki(key: Key) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_id(key: Key) -> bytes:
    return hashlib.sha256(spki(key)).digest()


def signed(key: Key, data: bytes) -> bytes:
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


@dataclass
class World:
    """Everything that a trusted root names."""

    ca_key: Key = field(default_factory=new_key)
    ct_key: Key = field(default_factory=new_key)
    rekor_key: Key = field(default_factory=new_key)

    def __post_init__(self) -> None:
        public = self.ca_key.public_key()
        self.ca = (
            x509.CertificateBuilder()
            .subject_name(_NAME)
            .issuer_name(_NAME)
            .public_key(public)
            .serial_number(1)
            .not_valid_before(NOW - 1000 * MINUTES)
            .not_valid_after(NOW + 10**6 * MINUTES)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self.ca_key, hashes.SHA256())
        )

    @property
    def trusted_root(self) -> dict[str, Any]:
        since = {"start": "2026-01-01T00:00:00Z"}

        def log(key: Key) -> dict[str, Any]:
            public = {"rawBytes": b64(spki(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": since}
            names = {
                "baseUrl": "https://log.invalid",
                "hashAlgorithm": "SHA2_256",
                "logId": {"keyId": b64(key_id(key))},
            }
            return {**names, "publicKey": public}

        chain = {"certificates": [{"rawBytes": b64(self.ca.public_bytes(serialization.Encoding.DER))}]}
        subject = {"organization": "tests", "commonName": "ca"}
        authority = {"subject": subject, "uri": "https://ca.invalid", "certChain": chain, "validFor": since}
        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.rekor_key)],
            "certificateAuthorities": [authority],
            "ctlogs": [log(self.ct_key)],
            "timestampAuthorities": [],
        }

    def certificate(self, key: Key, identity: str, issuer: str) -> x509.Certificate:
        """For ten minutes from `NOW`, with the certificate log's timestamp in it."""
        san = x509.UniformResourceIdentifier(identity) if "://" in identity else x509.RFC822Name(identity)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca_key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(_NAME)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW)
            .not_valid_after(NOW + 10 * MINUTES)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(authority, critical=False)
            .add_extension(x509.SubjectAlternativeName([san]), critical=True)
            .add_extension(x509.UnrecognizedExtension(_ISSUER_OID, issuer.encode()), critical=False)
        )
        before = builder.sign(self.ca_key, hashes.SHA256()).tbs_certificate_bytes
        moment = int(NOW.timestamp() * 1000)
        entry = key_id(self.ca_key) + len(before).to_bytes(3, "big") + before
        signature = signed(self.ct_key, struct.pack("!BBQH", 0, 0, moment, 1) + entry + b"\0\0")
        sct = struct.pack("!B32sQHBBH", 0, key_id(self.ct_key), moment, 0, 4, 3, len(signature)) + signature
        listed = struct.pack("!HH", len(sct) + 2, len(sct)) + sct
        octets = b"\x04" + (bytes([len(listed)]) if len(listed) < 128 else b"\x81" + bytes([len(listed)])) + listed
        return builder.add_extension(x509.UnrecognizedExtension(_SCT_OID, octets), critical=False).sign(
            self.ca_key, hashes.SHA256()
        )

    def sign(
        self, content: bytes, identity: str = IDENTITY, issuer: str = ISSUER, *, minutes: int = 1
    ) -> dict[str, Any]:
        """A bundle over a file. `minutes`: after the certificate was made, the log has it."""
        key = new_key()
        certificate = self.certificate(key, identity, issuer)
        digest, signature = hashlib.sha256(content).digest(), signed(key, content)
        body = canonical(
            {
                "apiVersion": "0.0.1",
                "kind": "hashedrekord",
                "spec": {
                    "data": {"hash": {"algorithm": "sha256", "value": digest.hex()}},
                    "signature": {
                        "content": b64(signature),
                        "publicKey": {"content": b64(certificate.public_bytes(serialization.Encoding.PEM))},
                    },
                },
            }
        )
        log_id, at = key_id(self.rekor_key), int((NOW + minutes * MINUTES).timestamp())
        other = hashlib.sha256(b"\0another entry").digest()
        root = hashlib.sha256(b"\1" + other + hashlib.sha256(b"\0" + body).digest()).digest()
        note = f"log.invalid - 1\n2\n{b64(root)}\n"
        note_signature = b64(log_id[:4] + signed(self.rekor_key, note.encode()))
        promise = {"body": b64(body), "integratedTime": at, "logID": log_id.hex(), "logIndex": 1}
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "certificate": {"rawBytes": b64(certificate.public_bytes(serialization.Encoding.DER))},
                "tlogEntries": [
                    {
                        "logIndex": "1",
                        "logId": {"keyId": b64(log_id)},
                        "kindVersion": {"kind": "hashedrekord", "version": "0.0.1"},
                        "integratedTime": str(at),
                        "inclusionPromise": {"signedEntryTimestamp": b64(signed(self.rekor_key, canonical(promise)))},
                        "inclusionProof": {
                            "logIndex": "1",
                            "rootHash": b64(root),
                            "treeSize": "2",
                            "hashes": [b64(other)],
                            "checkpoint": {"envelope": f"{note}\n— log.invalid {note_signature}\n"},
                        },
                        "canonicalizedBody": b64(body),
                    }
                ],
            },
            "messageSignature": {
                "messageDigest": {"algorithm": "SHA2_256", "digest": b64(digest)},
                "signature": b64(signature),
            },
        }


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
        *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})
