"""A TCP proxy that forwards until it forgets: then it swallows what comes on the connections that there are."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from types import TracebackType


class ForgetfulProxy:
    """As a NAT whose table was lost: no end and no reset is seen, and new connections work."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "tcp:{}:{}".format(*self._listener.getsockname())
        self._over = threading.Event()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._forgotten: list[tuple[socket.socket, socket.socket]] = []
        self._thread = threading.Thread(target=self._run)

    def forget(self) -> None:
        """Nothing passes on the connections of now, either way."""
        self._forgotten, self._pairs = self._forgotten + self._pairs, []

    def _run(self) -> None:
        while not self._over.is_set():
            pairs = list(self._pairs)
            ends = {end: other for pair in pairs for end, other in (pair, pair[::-1])}
            ready, _, _ = select.select([self._listener, *ends], [], [], 0.05)
            for sock in ready:
                if sock is self._listener:
                    self._pairs.append((self._listener.accept()[0], socket.create_connection(self._target)))
                elif any(sock in pair for pair in self._pairs):
                    self._forward(sock, ends[sock])

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if data := source.recv(1 << 16):
                target.sendall(data)
                return
        self._pairs = [pair for pair in self._pairs if source not in pair]
        source.close()
        target.close()

    def __enter__(self) -> ForgetfulProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        for pair in (*self._pairs, *self._forgotten):
            for sock in pair:
                sock.close()
        self._listener.close()
