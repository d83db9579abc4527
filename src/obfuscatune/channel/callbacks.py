"""OpenSSL's callbacks of a channel, for processes that may have no memory that is both written and executed.

pyOpenSSL makes each callback in such memory, and fails where the system refuses it (systemd's MemoryDenyWriteExecute=,
PR_SET_MDWE). ctypes makes them of libffi's static trampolines, which lie in the library's own code. Both functions here
are made once and live as long as the process, as OpenSSL needs them to.
"""

import ctypes
from typing import Any

from cryptography.hazmat.bindings.openssl.binding import Binding
from OpenSSL import SSL

_OPENSSL = Binding()
"""The library that pyOpenSSL calls."""
_VERIFY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_SELECT = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_ubyte),
    ctypes.c_void_p,
    ctypes.c_uint,
    ctypes.c_void_p,
)
_VERIFY_C = "int (*)(int, X509_STORE_CTX *)"
_SELECT_C = "int (*)(SSL *, unsigned char **, unsigned char *, const unsigned char *, unsigned int, void *)"
_OK, _NONE = 0, 3  # SSL_TLSEXT_ERR_OK, SSL_TLSEXT_ERR_NOACK: no protocol, which `Session.handshake` refuses
PROTOCOL = b"obfuscatune-attested/1"
"""The name that TLS negotiates (ALPN, RFC 7301)."""


def _accept_any(_verified: int, _store: int) -> int:
    """Accept a certificate whatever it is. An exception would count as 0, which refuses."""
    return 1


def _select(_tls: Any, chosen: Any, length: Any, offered: Any, size: int, _argument: Any) -> int:
    """Choose `PROTOCOL` of the client's list, which OpenSSL has checked: names, each after its length in one byte."""
    names, at = ctypes.string_at(offered, size), 0
    while at < size:
        end = at + 1 + names[at]
        if names[at + 1 : end] == PROTOCOL:
            chosen[0], length[0] = offered + at + 1, names[at]
            return _OK
        at = end
    return _NONE


_ACCEPT_ANY, _CHOOSE = _VERIFY(_accept_any), _SELECT(_select)


def ask_for_any_certificate(context: SSL.Context) -> None:
    """The peer must show a certificate, and prove that it has its key; which one is for others to judge."""
    mode = SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT
    _OPENSSL.lib.SSL_CTX_set_verify(context._context, mode, _pointer(_ACCEPT_ANY, _VERIFY_C))


def speak_our_protocol(context: SSL.Context, *, server: bool) -> None:
    """Negotiate `PROTOCOL`, or none."""
    if server:
        select = _pointer(_CHOOSE, _SELECT_C)
        _OPENSSL.lib.SSL_CTX_set_alpn_select_cb(context._context, select, _OPENSSL.ffi.NULL)
    else:
        context.set_alpn_protos([PROTOCOL])


def _pointer(function: Any, kind: str) -> Any:
    return _OPENSSL.ffi.cast(kind, ctypes.cast(function, ctypes.c_void_p).value)
