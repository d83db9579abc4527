"""Fields of reports, and signatures of two numbers."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from obfuscatune.attest.fields import Reader, ecdsa_verifies
from obfuscatune.errors import EvidenceError


def test_fields_are_taken_one_behind_another():
    reader = Reader(b"\x01\x00\x02ab\x03\x00rest", "the report")
    assert reader.take(1) == b"\x01"
    assert reader.sized(">H") == b"ab"
    assert reader.unpack("<H") == (3,)
    assert (reader.at, reader.rest) == (7, b"rest")
    with pytest.raises(EvidenceError, match="the report has bytes behind its end"):
        reader.end()
    assert reader.take(4) == b"rest"
    reader.end()


@pytest.mark.parametrize("take", [lambda it: it.take(5), lambda it: it.unpack("<Q"), lambda it: it.sized(">H")])
def test_what_is_not_there_is_not_taken(take):
    with pytest.raises(EvidenceError, match="the report ends too early"):
        take(Reader(b"\x00\x03ab", "the report"))


def test_a_signature_is_of_one_key_and_one_message():
    key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    r, s = decode_dss_signature(key.sign(b"said", ec.ECDSA(SHA256())))
    assert ecdsa_verifies(key.public_key(), r, s, b"said", SHA256())
    assert not ecdsa_verifies(key.public_key(), r, s, b"not said", SHA256())
    assert not ecdsa_verifies(other.public_key(), r, s, b"said", SHA256())
    assert not ecdsa_verifies(key.public_key(), 0, s, b"said", SHA256())
