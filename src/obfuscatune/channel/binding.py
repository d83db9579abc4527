"""What ties a session to its TLS connection, and a secret released in it to the session.

The report data itself is `attest.binding.Binding`. Fields are joined with their lengths before them, as there.
"""

import hashlib

EXPORTER_LABEL = b"EXPERIMENTAL obfuscatune attest v1"
"""RFC 5705, section 4: labels that begin with EXPERIMENTAL need no registration."""
EXPORTER_BYTES = 32
RELEASE_LABEL = b"obfuscatune/release/v1"


def release_info(kind: str, report_data: bytes, sequence: int, document: bytes) -> bytes:
    """HPKE's `info` for a secret: it opens in this session alone, as this request, with this document.

    Args:
        kind: of the request, "grant" say.
        report_data: the session's, which no other session has.
        sequence: the request's number in the session.
        document: the canonical bytes of what the secret is released with.
    """
    number = sequence.to_bytes(4, "big")
    fields = (RELEASE_LABEL, kind.encode(), report_data, number, hashlib.sha256(document).digest())
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)
