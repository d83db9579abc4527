"""The network between two machines, as its operator has it: it forwards bytes, and keeps a copy."""

import contextlib
import socket
import threading
from pathlib import Path
from typing import Self

_CHUNK_BYTES = 256 * 1024
_CONNECT_SECONDS = 10.0
_MOST_CONNECTIONS = 256


class Tap:
    """Listens at a port of `host`, forwards each connection to `target`, and writes all that passed to one file.

    Both directions and all connections go to the same file, piece by piece as they came. Ends with its `with`.
    """

    def __init__(self, host: str, target: tuple[str, int], record: Path) -> None:
        self._target = target
        self._record = record.open("ab")
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((host, 0))
        self.host, self.port = host, int(self._listener.getsockname()[1])
        self.passed = 0
        """Bytes, both ways."""

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{self.host}:{self.port}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # `accept` returns, which it does not on `close`
        with self._lock:
            ends, threads = list(self._ends), list(self._threads)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for end in (*self._ends, self._listener):
            end.close()
        self._record.close()

    def _start(self, run: object, *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, name="tap", daemon=True)  # type: ignore[arg-type]  # of ours
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        for _ in range(_MOST_CONNECTIONS):
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target, timeout=_CONNECT_SECONDS)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._ends += [near, far]
            self._start(self._pump, near, far)
            self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # either side may be gone first
            while data := source.recv(_CHUNK_BYTES):
                with self._lock:
                    self._record.write(data)
                    self.passed += len(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
