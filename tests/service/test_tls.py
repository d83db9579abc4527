"""TLS towards strangers: handshakes that stall are few, end soon, and keep no owner out."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn

from obfuscatune.service.api.tls import Gate, Handshakes, HttpsIdentity, peer_of
from obfuscatune.service.server import _Server
from tests.service.parties import Party

pytestmark = pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning")
SECONDS = 20
REQUEST = b"GET /who HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


class Api:
    """A server that answers with the key of whoever asks."""

    def __init__(self, most: int, seconds: float) -> None:
        self.https = HttpsIdentity()
        self.owner = Party.make("owner")
        self.https.admit(self.owner.identity.certificate_pem)
        self.handshakes = Handshakes(self.https.context, most, seconds)

    async def app(self, scope: Any, _receive: Any, send: Any) -> None:
        body = str(peer_of(scope)).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    @contextmanager
    def served(self) -> Iterator[None]:
        started = threading.Event()

        class Server(_Server):
            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets)
                started.set()

        gate: Any = partial(Gate, self.handshakes)
        common: Any = {"interface": "asgi3", "lifespan": "off", "log_config": None, "loop": "asyncio", "ws": "none"}
        config = uvicorn.Config(self.app, http=gate, **common)
        server = Server(config, self.handshakes)
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
            self.port = listening.getsockname()[1]
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
            thread.start()
            assert started.wait(SECONDS)

            def stop() -> None:
                server.should_exit = True
                thread.join(SECONDS)
                assert not thread.is_alive()

            self.stop = stop
            try:
                yield
            finally:
                stop()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), SECONDS)

    def context(self, tmp_path: Any) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(*self.owner.files(tmp_path))
        return context

    def who(self, context: ssl.SSLContext) -> str:
        """What the server says of an owner who asks."""
        with self.connect() as plain, context.wrap_socket(plain) as wrapped:
            wrapped.sendall(REQUEST)
            said = b""
            while piece := wrapped.recv(4096):
                said += piece
        return said.rpartition(b"\r\n\r\n")[2].decode()


def hello(context: ssl.SSLContext) -> bytes:
    """The first message of a handshake."""
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def is_cut_off(stranger: socket.socket) -> bool:
    """Waits, and reads what the server may have said before."""
    try:
        while stranger.recv(65536):
            pass
    except (ConnectionError, ssl.SSLError):
        pass
    return True


def test_strangers_who_stall_are_few_and_keep_nobody_out(tmp_path: Any) -> None:
    """The first to stall is the first to go; the time alone would let all of them stay."""
    api = Api(most=4, seconds=600)
    context = api.context(tmp_path)
    begun = hello(context)
    with ExitStack() as stack, api.served():
        strangers = [stack.enter_context(api.connect()) for _ in range(40)]
        for number, stranger in enumerate(strangers):
            if number % 2:
                stranger.sendall(begun[: len(begun) - number % 3])  # a part of it, or all of it and nothing more
        for stranger in strangers[:36]:
            assert is_cut_off(stranger)
        assert len(api.handshakes) == 4
        assert api.who(context) == api.owner.spki
        assert is_cut_off(strangers[36])
        assert len(api.handshakes) == 3
        for stranger in strangers[37:]:  # these are waited for still
            stranger.setblocking(False)
            try:
                while stranger.recv(65536):
                    pass
                raise AssertionError("it was cut off")
            except BlockingIOError:
                pass
            stranger.settimeout(SECONDS)
        api.stop()
        assert all(map(is_cut_off, strangers[37:]))  # the server ended, and waited for none of them


def test_a_handshake_has_its_time_and_a_connection_has_more(tmp_path: Any) -> None:
    api = Api(most=100, seconds=0.5)
    context = api.context(tmp_path)
    with api.served(), ExitStack() as stack:
        with api.connect() as plain, context.wrap_socket(plain) as known:
            known.do_handshake()
            strangers = [stack.enter_context(api.connect()) for _ in range(3)]
            strangers[1].sendall(hello(context))
            strangers[2].sendall(b"\x16\x03\x01")
            assert all(map(is_cut_off, strangers))
            known.sendall(REQUEST)  # later than any handshake may end
            assert api.owner.spki.encode() in known.recv(4096) + known.recv(4096)
        assert not len(api.handshakes)


def test_who_has_no_certificate_or_speaks_no_tls_is_out_at_once(tmp_path: Any) -> None:
    api = Api(most=2, seconds=600)
    context = api.context(tmp_path)
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
    with api.served():
        for _ in range(5):
            with api.connect() as plain, nobody.wrap_socket(plain) as wrapped:
                assert is_cut_off(wrapped)  # the client's side of a handshake ends before the server's
            with api.connect() as plain:
                plain.sendall(REQUEST)
                assert is_cut_off(plain)
        assert api.who(context) == api.owner.spki


def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(tmp_path: Any) -> None:
    """In one segment: the server reads it before it knows that the handshake is done."""
    api = Api(most=2, seconds=60)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = api.context(tmp_path).wrap_bio(incoming, outgoing)
    with api.served(), api.connect() as plain:
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                plain.sendall(outgoing.read())
                incoming.write(plain.recv(65536))
        client.write(REQUEST)
        plain.sendall(outgoing.read())
        said = b""
        while not said.endswith(api.owner.spki.encode()):
            piece = plain.recv(65536)
            assert piece, said
            incoming.write(piece)
            try:
                while got := client.read(65536):
                    said += got
            except ssl.SSLWantReadError:
                pass
