"""The publisher serves one list, and its clients cannot keep it from others."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator

import pytest

from obfuscatune.cluster import publisher
from obfuscatune.cluster.publisher import Publisher
from obfuscatune.errors import ConfigError
from obfuscatune.protocol.addresses import TcpAddress


@pytest.fixture
def serving() -> Iterator[Publisher]:
    made = Publisher(TcpAddress("127.0.0.1", 0))
    yield made
    made.close()


def get(serving: Publisher, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", serving.address.port, timeout=20)
    try:
        connection.request(method, path)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_there_is_a_list_once_there_is_one(serving: Publisher) -> None:
    assert [get(serving, path)[0] for path in ("/fleet.json", "/healthz")] == [503, 503]
    serving.publish(b"one")
    serving.publish(b"two")
    assert get(serving, "/fleet.json") == (200, b"two")
    assert get(serving, "/healthz") == (200, b"")


@pytest.mark.parametrize("path", ["/", "/fleet.json/", "/../etc/passwd", "/fleet.json?x"])
def test_nothing_else_is_served(serving: Publisher, path: str) -> None:
    serving.publish(b"one")
    assert get(serving, path)[0] == 404


def test_nothing_can_be_sent(serving: Publisher) -> None:
    assert get(serving, "/fleet.json", "POST")[0] == 501


def test_silent_clients_lose_their_places(serving: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "REQUEST_SECONDS", 0.5)
    serving.publish(b"one")
    silent = [socket.create_connection(("127.0.0.1", serving.address.port)) for _ in range(publisher.MOST_CONNECTIONS)]
    for sock in silent:
        sock.settimeout(20)
        assert sock.recv(1) == b""  # closed, and not by us
        sock.close()
    assert get(serving, "/fleet.json") == (200, b"one")


def test_an_address_that_is_taken_is_one_error(serving: Publisher) -> None:
    with pytest.raises(ConfigError, match="cannot publish"):
        Publisher(serving.address)
