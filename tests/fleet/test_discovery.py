"""A server of lists that is hostile, slow or broken: the last good list stays, in bounded time and memory."""

from __future__ import annotations

import importlib.util
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from obfuscatune.errors import ConfigError, DiscoveryError
from obfuscatune.fleet.discovery import Discovery, fetch, split_url
from obfuscatune.fleet.listing import MAX_LIST_BYTES
from obfuscatune.fleet.members import Member
from tests.fleet.lists import accepts, document, entry, member

ROOT = Path(__file__).parents[2]
Answer = Callable[[socket.socket], None]


class Server:
    """Answers each connection as `answer` says, after reading the request."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/fleet.json"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(10)
                try:
                    self.requests.append(sock.recv(65536))
                    self.answer(sock)
                except OSError:
                    continue

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    server = Server(answer)
    try:
        yield server
    finally:
        server.close()


def ok(body: bytes, headers: bytes = b"") -> Answer:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n" % (len(body), headers)
    return lambda sock: sock.sendall(head + body)


def test_the_enclave_has_no_ray() -> None:
    """Neither here, where the enclave's code is tested, nor among what its image installs."""
    assert importlib.util.find_spec("ray") is None
    for name in ("dev", "enclave"):
        listed = re.findall(r"^([a-z0-9-]+)==", (ROOT / f"requirements/{name}.txt").read_text("utf-8"), re.MULTILINE)
        assert "cryptography" in listed
        assert "ray" not in listed


def drip(sock: socket.socket) -> None:
    """Headers without end, a byte at a time."""
    sock.sendall(b"HTTP/1.1 200 OK\r\n")
    for _ in range(200):
        sock.sendall(b"x")
        time.sleep(0.05)


def flood(sock: socket.socket) -> None:
    """A body without end."""
    sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(4 * MAX_LIST_BYTES // 65536):
        sock.sendall(b" " * 65536)


@pytest.mark.parametrize(
    "answer",
    [
        lambda sock: None,
        lambda sock: sock.sendall(b"\x16\x03\x01\x00\x00"),
        lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000 + b"\r\n" + document(entry())),
        lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n[]"),
        lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + document(entry())[:-5]),
        lambda sock: sock.sendall(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"),
        ok(b"\x80\x04K\x01."),
        flood,
    ],
    ids=["nothing", "tls", "headers", "length", "truncated", "status", "pickle", "flood"],
)
def test_what_is_no_answer_is_one_error(answer: Answer) -> None:
    with serving(answer) as server, pytest.raises(DiscoveryError):
        Discovery(server.url, accepts("cloud-a"), say=pytest.fail)


def test_a_redirect_is_not_followed() -> None:
    with serving(ok(document(entry()))) as other:
        moved = b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % other.url.encode()
        with serving(lambda sock: sock.sendall(moved)) as server, pytest.raises(DiscoveryError, match="302"):
            fetch(server.url)
        assert not other.requests


def test_an_answer_that_never_ends_is_cut_off() -> None:
    began = time.monotonic()
    with serving(drip) as server, pytest.raises(DiscoveryError):
        fetch(server.url, 0.5)
    assert time.monotonic() - began < 5  # a byte every 0.05 s, for 10 s, would be waited for


def test_nobody_there_is_one_error() -> None:
    with serving(ok(b"")) as server:
        url = server.url
    with pytest.raises(DiscoveryError):
        fetch(url)


NO_ADDRESSES = """
fleet.json file:///etc/passwd ftp://x/ http:// http://user@x/ http://x:0/ http://x:99999/ http://x/?q http://x/#f http://[::1/
"""


@pytest.mark.parametrize("url", ["", "http://x/a b", "http://x/\r\nHost: y", *NO_ADDRESSES.split()])
def test_an_address_that_is_no_address_of_a_list_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        split_url(url)


def test_the_path_may_be_left_out() -> None:
    assert split_url("http://[::1]:7650") == ("http", "::1", 7650, "/fleet.json")
    assert split_url("https://fleet.example/a/list")[2:] == (443, "/a/list")


def test_whom_the_policy_does_not_accept_is_left_out_and_named() -> None:
    said: list[str] = []
    stranger = entry(1, "cloud-b", operator="cloud-a")
    with serving(ok(document(entry(0), stranger))) as server:
        found = Discovery(server.url, accepts("cloud-a"), say=said.append)
        assert found.members == (member(0),)
        found.refresh()
    assert len(said) == 1  # said once
    assert "tcp:127.0.0.1:7601" in said[0]


def test_a_list_of_strangers_alone_is_an_error() -> None:
    with serving(ok(document(entry(0, "cloud-b")))) as server, pytest.raises(DiscoveryError, match="accepts none"):
        Discovery(server.url, accepts("cloud-a"), say=pytest.fail)


@pytest.mark.parametrize(
    "bad", [ok(b""), ok(document()), ok(document(entry(0, "cloud-b"))), lambda sock: None, ok(b"null")]
)
def test_a_list_that_is_no_good_leaves_the_last_one(bad: Answer) -> None:
    said: list[str] = []
    changes: list[tuple[Member, ...]] = []
    with serving(ok(document(entry(0)))) as server:
        found = Discovery(server.url, accepts("cloud-a"), say=said.append, changed=changes.append)
        server.answer = bad
        assert found.refresh() == found.refresh() == (member(0),)
        assert len(said) == 1
        assert not changes
        server.answer = ok(document(entry(1), entry(0)))
        assert found.refresh() == (member(1), member(0))
        assert changes == [(member(1), member(0))]


def test_the_list_is_looked_at_until_closed() -> None:
    came = threading.Event()
    with serving(ok(document(entry(0)))) as server:
        found = Discovery(server.url, accepts("cloud-a"), say=pytest.fail, changed=lambda _: came.set(), interval=0.05)
        with found:
            server.answer = ok(document(entry(0), entry(1)))
            assert came.wait(20)
        assert len(found.members) == 2
        assert not any(thread.name == "discovery" for thread in threading.enumerate())
