"""What a peer speaks that does not speak our protocol, by its first bytes; and what to do about it."""

import re

TLS_STARTS = (b"\x16", b"\x15")
"""The first byte of a TLS record that holds a handshake or an alert (RFC 8446, section 5.1)."""
_OPTIONS = "give --tls-cert, --tls-key and --peer on both sides, or on neither"
_ADDRESS = "so it is no ObfuscaTune worker or enclave: look at the address and the port"
_HTTP = (b"HTTP/", b"GET ", b"POST", b"HEAD", b"PUT ", b"OPTI", b"CONN", b"DELE", b"PATC", b"TRAC", b"PRI ")
_BY_THE_REST = (
    (re.compile(rb"\d(\.\d)? \d{3}"), b"HTTP/"),
    (re.compile(rb"\.\d+-"), b"SSH-2"),
    (re.compile(rb"\x0c\0{6}"), b"OBFT\x01"),  # an ERROR of ours
)


def what_it_speaks(first: bytes | bytearray | memoryview) -> str:
    """One clause on a peer whose first bytes are not what was expected."""
    start = bytes(first[:5])
    if start.startswith(TLS_STARTS):
        return f"it speaks TLS, and we do not: {_OPTIONS}"
    if start.startswith(b"OBFT"):
        return f"it speaks our protocol without TLS, and we speak it by TLS: {_OPTIONS}"
    if start.startswith(_HTTP):
        return f"it speaks HTTP, {_ADDRESS}"
    if start.startswith(b"SSH-"):
        return f"it speaks SSH, {_ADDRESS}"
    return "it speaks another protocol: look at the address and the port, and whether both sides have the same release"


def what_it_spoke(rest: bytes) -> str:
    """The same by what follows the first five bytes, which OpenSSL has taken for the header of a record."""
    known = (begin for pattern, begin in _BY_THE_REST if pattern.match(rest))
    return what_it_speaks(next(known, b""))
