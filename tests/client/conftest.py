"""A real HTTPS server in this process, that knows its clients by their certificates."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from obfuscatune.channel.identity import Identity
from obfuscatune.client.connection import _show


@contextmanager
def served(app, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """An ASGI application on a free port of 127.0.0.1; the port."""
    config = uvicorn.Config(app, log_level="error", lifespan="on")
    config.load()
    if context is not None:
        config.ssl = context
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            started.set()

    server = Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        assert started.wait(10)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


def server_context(server: Identity, client: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _show(server, context)
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=client.certificate_pem.decode())
    return context


@pytest.fixture
def owner() -> Identity:
    return Identity.generate("owner")


@pytest.fixture
def enclave() -> Identity:
    return Identity.generate("enclave")
