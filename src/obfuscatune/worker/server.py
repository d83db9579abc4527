"""Accepts enclaves and gives each connection its thread."""

import logging
import threading

from obfuscatune.wire.deadline import Deadline
from obfuscatune.wire.errors import ConnectionLost, WireError
from obfuscatune.wire.limits import HANDSHAKE_SECONDS, MAX_CONNECTIONS
from obfuscatune.wire.listen import Listener
from obfuscatune.wire.transport import SocketTransport
from obfuscatune.worker.connection import Connection, Service

log = logging.getLogger(__name__)
GRACE_SECONDS = 10.0
"""How long requests already received may take to be answered once the worker is asked to stop."""


class Server:
    """A worker that listens."""

    def __init__(self, listener: Listener, service: Service) -> None:
        self._listener = listener
        self._service = service
        self._open: dict[threading.Thread, SocketTransport] = {}
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Serve until `stop`; then answer what was already asked, and return."""
        while (transport := self._listener.accept()) is not None:
            thread = threading.Thread(target=self._serve_one, args=(transport,), name="connection", daemon=True)
            with self._lock:
                crowded = len(self._open) >= MAX_CONNECTIONS
                if not crowded:
                    self._open[thread] = transport
            if crowded:
                log.warning("a connection was refused: %d are open", MAX_CONNECTIONS)
                transport.close()
                continue
            thread.start()
        self._wind_down()

    def stop(self) -> None:
        """Make `serve` return soon. From any thread, or a signal handler."""
        self._listener.stop()

    def _serve_one(self, transport: SocketTransport) -> None:
        try:
            transport.establish(Deadline(HANDSHAKE_SECONDS))
            Connection(transport, self._service).serve()
        except WireError as error:
            log.warning("a connection was refused: %s", error)
        finally:
            transport.close()
            with self._lock:
                del self._open[threading.current_thread()]

    def _wind_down(self) -> None:
        with self._lock:
            still_open = dict(self._open)
        for transport in still_open.values():
            try:
                transport.stop_reading()
            except ConnectionLost as error:
                log.info("%s", error)
        for thread in still_open:
            thread.join(GRACE_SECONDS)
        self._listener.close()
