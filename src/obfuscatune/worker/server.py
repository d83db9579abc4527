"""Accepts enclaves and gives each connection its thread."""

import contextlib
import functools
import logging
import threading
from collections import Counter

from obfuscatune.wire.deadline import Deadline
from obfuscatune.wire.errors import ConnectionLost, WireError
from obfuscatune.wire.limits import HANDSHAKE_SECONDS, MAX_HANDSHAKES
from obfuscatune.wire.listen import Listener
from obfuscatune.wire.transport import SocketTransport
from obfuscatune.worker.connection import Connection, Service

log = logging.getLogger(__name__)
GRACE_SECONDS = 10.0
"""How long requests already received may take to be answered once the worker is asked to stop."""


class Handshakes:
    """Connections that have not said who they are yet: few, so that strangers cannot take the places of others.

    The oldest of the address that has most of them ends where there are too many: a stranger can hold up others at his
    own address at the most, and those only with more connections in the time of a handshake than there are places.
    """

    def __init__(self, most: int = MAX_HANDSHAKES) -> None:
        self._most = most
        self._open: list[SocketTransport] = []  # oldest first
        self._lock = threading.Lock()

    def begin(self, transport: SocketTransport) -> None:
        """A connection was accepted."""
        with self._lock:
            self._open.append(transport)
            if len(self._open) <= self._most:
                return
            ((crowd, _),) = Counter(other.address_id for other in self._open).most_common(1)
            oldest = next(other for other in self._open if other.address_id == crowd)
            self._open.remove(oldest)
        log.warning("a connection of %s was ended: %d others say nothing either", crowd, self._most)
        with contextlib.suppress(ConnectionLost):
            oldest.shutdown()

    def end(self, transport: SocketTransport) -> None:
        """It has said who it is, or it has ended. Twice is once."""
        with self._lock, contextlib.suppress(ValueError):
            self._open.remove(transport)


class Server:
    """A worker that listens."""

    def __init__(self, listener: Listener, service: Service) -> None:
        self._listener = listener
        self._service = service
        self._handshakes = Handshakes()
        self._open: dict[threading.Thread, SocketTransport] = {}
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Serve until `stop`; then answer what was already asked, and return."""
        while (transport := self._listener.accept()) is not None:
            thread = threading.Thread(target=self._serve_one, args=(transport,), name="connection", daemon=True)
            self._handshakes.begin(transport)
            with self._lock:
                self._open[thread] = transport
            try:
                thread.start()
            except RuntimeError as error:  # no thread can be had: others may end meanwhile
                log.warning("a connection was refused: %s", error)
                self._ended(thread, transport)
        self._wind_down()

    def stop(self) -> None:
        """Make `serve` return soon. From any thread, or a signal handler."""
        self._listener.stop()

    def _serve_one(self, transport: SocketTransport) -> None:
        try:
            transport.establish(Deadline(HANDSHAKE_SECONDS))
            greeted = functools.partial(self._handshakes.end, transport)
            Connection(transport, transport.peer_id, self._service, greeted).serve()
        except (WireError, RuntimeError, MemoryError) as error:
            log.warning("a connection was refused: %s", error)
        finally:
            self._ended(threading.current_thread(), transport)

    def _ended(self, thread: threading.Thread, transport: SocketTransport) -> None:
        self._handshakes.end(transport)
        transport.close()
        with self._lock:
            del self._open[thread]

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
