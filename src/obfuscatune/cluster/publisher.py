"""Serves a fleet's list by HTTP: two paths, no state, nothing read of a request but its path."""

import contextlib
import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from obfuscatune.errors import ConfigError
from obfuscatune.protocol.addresses import TcpAddress

MOST_CONNECTIONS = 64
REQUEST_SECONDS = 10.0
"""Longest time of a connection, however slowly its client sends or reads."""
_CLOSE_SECONDS = 0.1
"""Within which `close` is noticed."""
LIST_PATH, HEALTH_PATH = "/fleet.json", "/healthz"


class Publisher:
    """Serves the newest list that it was given, in threads of its own."""

    def __init__(self, address: TcpAddress) -> None:
        """Raises ConfigError: nothing can listen there."""
        try:
            self._server = _Server((address.host, address.port), _Handler)
        except OSError as error:
            raise ConfigError(f"cannot publish at {address}: {error.strerror or error}") from error
        self.address = TcpAddress(address.host, int(self._server.server_address[1]))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_CLOSE_SECONDS,), name="publisher", daemon=True
        )
        self._thread.start()

    def publish(self, data: bytes) -> None:
        """Serve this list from now on."""
        self._server.data = data

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = MOST_CONNECTIONS
    data: bytes | None = None

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        timer = threading.Timer(REQUEST_SECONDS, _cut, [request])
        timer.daemon = True
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client went away: nothing to say."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "obfuscatune", ""

    def do_GET(self) -> None:
        data = self.server.data
        if self.path not in (LIST_PATH, HEALTH_PATH):
            self._answer(HTTPStatus.NOT_FOUND, b"")
        elif data is None:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, b"")
        else:
            self._answer(HTTPStatus.OK, data if self.path == LIST_PATH else b"")

    def _answer(self, status: HTTPStatus, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def _cut(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)
