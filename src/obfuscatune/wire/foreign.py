"""What a peer speaks that does not speak our protocol, by its first bytes; and what to do about it."""

TLS_TYPES = b"\x16\x15"
"""The first byte of a TLS record that holds a handshake or an alert (RFC 8446, section 5.1)."""
_OPTIONS = "--tls-cert, --tls-key and --peer"
_HTTP = (b"HTTP/", b"GET ", b"POST", b"HEAD", b"PUT ", b"OPTI", b"CONN", b"DELE", b"PATC", b"TRAC", b"PRI ")


def what_it_speaks(first: bytes | bytearray | memoryview) -> str:
    """One clause on a peer whose first bytes are neither ours nor, where that was expected, TLS."""
    start = bytes(first[:5])
    if start[:1] in (TLS_TYPES[:1], TLS_TYPES[1:]):
        return f"it speaks TLS, and we do not: give {_OPTIONS} on both sides, or on neither"
    if start.startswith(_HTTP):
        return "it speaks HTTP, so it is no ObfuscaTune worker or enclave: look at the address and the port"
    if start.startswith(b"SSH-"):
        return "it speaks SSH, so it is no ObfuscaTune worker or enclave: look at the address and the port"
    return "it speaks another protocol: look at the address and the port, and whether both sides have the same release"


WITHOUT_TLS = (
    f"it speaks our protocol without TLS, and we speak it by TLS: give {_OPTIONS} on both sides, or on neither"
)
