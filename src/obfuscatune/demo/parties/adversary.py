"""Whoever owns the network between a party and the enclave, and relays the enclave's evidence as their own."""

import contextlib
import socket
import threading
from typing import Self

from obfuscatune.channel.identity import Identity
from obfuscatune.channel.messages import Hello, MessageType, pack, parse_body
from obfuscatune.channel.session import Session, tls_context
from obfuscatune.errors import ObfuscaTuneError
from obfuscatune.protocol.sockets import Deadline

_SECONDS = 30.0


class RelayingAdversary:
    """Listens where a party believes the enclave to be, and passes on the evidence of the real one, once.

    Its TLS ends in its own key on both sides, so it could read all that follows, were the evidence accepted.
    """

    def __init__(self, host: str, enclave: tuple[str, int]) -> None:
        self._enclave, self._identity = enclave, Identity.generate("adversary")
        self._listener = socket.create_server((host, 0))
        self._listener.settimeout(_SECONDS)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self.relayed = False
        """Whether genuine evidence was passed on."""
        self._thread = threading.Thread(target=self._serve, name="adversary", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(ObfuscaTuneError, OSError):
            party = Session(self._listener.accept()[0], tls_context(self._identity, server=True), server=True)
            try:
                party.handshake(Deadline(_SECONDS))
                self._relay(party)
            finally:
                party.end()

    def _relay(self, party: Session) -> None:
        deadline = Deadline(_SECONDS)
        sock = socket.create_connection(self._enclave, timeout=_SECONDS)
        enclave = Session(sock, tls_context(self._identity, server=False), server=False)
        try:
            enclave.handshake(deadline)
            hello = Hello.parse(party.receive(MessageType.HELLO, deadline))
            enclave.send(hello.pack(), deadline)
            body = enclave.receive(MessageType.EVIDENCE, deadline)
            evidence = parse_body(body, frozenset({"claims", "evidence"}))
            party.send(pack(MessageType.EVIDENCE, evidence), deadline)
            self.relayed = True
            party.receive(MessageType.REQUEST, deadline)  # which never comes
        finally:
            enclave.end()
