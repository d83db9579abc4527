"""What reports of platforms have in common: fields that lie one behind another, and signatures of two numbers."""

import struct

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import HashAlgorithm

from obfuscatune.errors import EvidenceError


class Reader:
    """Takes fields off the front of bytes that an attester sent.

    Args:
        data: Untrusted.
        what: Names them in errors: "tpm: the quote".
    """

    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._what, self.at = data, what, 0

    @property
    def rest(self) -> bytes:
        """What was not taken yet."""
        return self._data[self.at :]

    def take(self, count: int) -> bytes:
        """The next bytes. Raises EvidenceError: there are not so many."""
        if count > len(self._data) - self.at:
            raise EvidenceError(f"{self._what} ends too early")
        self.at += count
        return self._data[self.at - count : self.at]

    def unpack(self, form: str) -> tuple[int, ...]:
        """The next numbers, in a form of `struct`. Raises EvidenceError: it ends before them."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def sized(self, form: str) -> bytes:
        """The next field, whose length stands before it. Raises EvidenceError: it ends within."""
        return self.take(self.unpack(form)[0])

    def end(self) -> None:
        """Raises EvidenceError: something was not taken."""
        if self.rest:
            raise EvidenceError(f"{self._what} has bytes behind its end")


def ecdsa_verifies(key: ec.EllipticCurvePublicKey, r: int, s: int, data: bytes, algorithm: HashAlgorithm) -> bool:
    """Whether a key made the signature (r, s) over the data."""
    try:
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(algorithm))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True
