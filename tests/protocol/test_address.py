"""Addresses as one writes them, and what may leave the machine."""

from pathlib import Path

import pytest

from obfuscatune.errors import ConfigError
from obfuscatune.protocol.endpoints import TcpAddress, UnixAddress, check_tls, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/x.sock", UnixAddress(Path("/run/x.sock"))),
        ("tcp:example.org:7600", TcpAddress("example.org", 7600)),
        ("tcp:0.0.0.0:0", TcpAddress("0.0.0.0", 0)),
        ("tcp:[::1]:7600", TcpAddress("::1", 7600)),
    ],
)
def test_addresses(text: str, address: object) -> None:
    assert parse_address(text) == address
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:",
        "tcp:",
        "tcp:host",
        "tcp::80",
        "tcp:host:65536",
        "tcp:host:-1",
        "tcp:host:x",
        "http://x",
        "unix:" + "x" * 108,
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_plain_tcp_to_this_machine(host: str) -> None:
    check_tls(TcpAddress(host, 1), tls=False, plain_tcp=False)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "10.0.0.1", "::", "example.org", "localhost.example.org", "127.0.0.1.nip.io"]
)
def test_plain_tcp_that_leaves_this_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="without TLS"):
        check_tls(TcpAddress(host, 1), tls=False, plain_tcp=False)
    check_tls(TcpAddress(host, 1), tls=True, plain_tcp=False)
    check_tls(TcpAddress(host, 1), tls=False, plain_tcp=True)


def test_no_tls_on_a_unix_socket() -> None:
    with pytest.raises(ConfigError):
        check_tls(UnixAddress(Path("/x")), tls=True, plain_tcp=False)
