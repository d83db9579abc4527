"""One place of a fleet, on the machine where its worker runs: makes the key, starts the worker, starts it again.

The private key is made here and stays in a folder that exists as long as this object. What leaves is a request for a
certificate. An engine calls the methods of `Node` one by one; with Ray they are an actor's.
"""

import contextlib
import fcntl
import shutil
import socket
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ConfigError, ObfuscaTuneError
from obfuscatune.protocol.addresses import TcpAddress
from obfuscatune.protocol.authority import make_request
from obfuscatune.protocol.files import temporary_root, write_new

NEW, STARTING, RUNNING, FAILED = "new", "starting", "running", "failed"
WILDCARDS = ("0.0.0.0", "::")  # noqa: S104  compared with
_PREFIX, _LOCK = "obfuscatune-node-", "lock"
_SECONDS_BETWEEN_LOOKS = 0.2
_LONGEST_PAUSE = 30.0
_REASON_CHARACTERS = 500


@dataclass(frozen=True)
class NodeSettings:
    """How a worker is started."""

    host: str
    """The interface that it listens on; 0.0.0.0 for all."""
    ports: range
    """Of which it takes the first that is free; empty: any."""
    advertise: str | None
    """The host that enclaves connect to; None for the interface, or the machine's address where that is all."""
    device: str
    memory: str | None
    """For matrices, as 40GiB; None for the worker's default."""
    threads: int | None
    peers: bytes
    """Certificates of the enclaves that may connect, PEM."""


@dataclass(frozen=True)
class Report:
    """What a place says of its worker."""

    state: str
    """`NEW` until a certificate is given, then `STARTING`, `RUNNING`, or `FAILED` until the next attempt."""
    address: str | None
    """Where enclaves reach it; None until it ran once."""
    certificate: bytes | None
    device: str
    restarts: int
    reason: str
    """Of the last failure."""


class Node:
    """A place for one worker."""

    def __init__(self, name: str, settings: NodeSettings) -> None:
        self._name, self._settings = name, settings
        self._folder, self._lock = _make_folder()
        self._request, key = make_request(name)
        write_new(self._folder / "key.pem", key)
        write_new(self._folder / "peers.pem", settings.peers)
        self._certificate: bytes | None = None
        self._state, self._reason, self._restarts = NEW, "", 0
        self._port: int | None = None
        self._reached: int | None = None  # the port at which the worker ran last
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def request(self) -> bytes:
        """The request for a certificate of this place's key, PEM."""
        return self._request

    def start(self, certificate: bytes) -> None:
        """Start the worker under the certificate that was issued, and keep it running. Returns at once.

        Raises:
            ConfigError: it was started already.
        """
        if self._thread is not None:
            raise ConfigError(f"{self._name} was started already")
        write_new(self._folder / "cert.pem", certificate, 0o644)
        self._certificate, self._state = certificate, STARTING
        self._thread = threading.Thread(target=self._keep_running, name="node", daemon=True)
        self._thread.start()

    def report(self) -> Report:
        """How the worker is."""
        return Report(
            self._state, self._address(), self._certificate, self._settings.device, self._restarts, self._reason
        )

    def close(self) -> None:
        """End the worker and forget its key. Twice is once."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def _keep_running(self) -> None:
        pause = 1.0
        while not self._over.is_set():
            try:
                with self._start() as worker:
                    self._state, self._reached, pause = RUNNING, self._port, 1.0
                    while worker.process.poll() is None and not self._over.wait(_SECONDS_BETWEEN_LOOKS):
                        pass
                    self._reason = f"the worker ended with {worker.process.poll()}"
            except ObfuscaTuneError as error:
                self._state, self._reason = FAILED, str(error)[-_REASON_CHARACTERS:]
                self._over.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            if not self._over.is_set():
                self._state = STARTING
                self._restarts += 1

    def _start(self) -> LocalWorker:
        """Raises ObfuscaTuneError: it does not start."""
        self._port = self._free_port()
        it = self._settings
        arguments = ["--device", it.device]
        for option, value in (
            ("--quota", it.memory),
            ("--threads", it.threads),
            ("--tls-cert", self._folder / "cert.pem"),
            ("--tls-key", self._folder / "key.pem"),
            ("--peer", self._folder / "peers.pem"),
        ):
            if value is not None:
                arguments += [option, str(value)]
        return LocalWorker(arguments, listen=str(TcpAddress(it.host, self._port)))

    def _free_port(self) -> int:
        """The port of the start before, where it is free: enclaves then find the worker where it was.

        Raises:
            ConfigError: none is free.
        """
        before = [] if self._port is None else [self._port]
        for port in [*before, *(self._settings.ports or [0])]:
            with socket.socket(socket.AF_INET6 if ":" in self._settings.host else socket.AF_INET) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    sock.bind((self._settings.host, port))
                except OSError:
                    continue
                return int(sock.getsockname()[1])
        raise ConfigError(f"no port of --ports is free on {socket.gethostname()}")

    def _address(self) -> str | None:
        if self._reached is None:
            return None
        host = self._settings.advertise or self._settings.host
        return str(TcpAddress(own_address() if host in WILDCARDS else host, self._reached))


def _make_folder() -> tuple[Path, BinaryIO]:
    """A folder for a key, and the lock that says that its owner lives. Folders of owners that were killed go."""
    root = temporary_root()
    for abandoned in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (abandoned / _LOCK).open("rb") as of_owner:
            fcntl.flock(of_owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(abandoned, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=root))  # with mode 0700
    lock = (draft / _LOCK).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return draft.rename(root / draft.name[1:]), lock  # only now can others find it


def own_address() -> str:
    """The address of the interface by which this machine reaches others; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # of a range that belongs to nobody (RFC 5737)
            return str(sock.getsockname()[0])
        except OSError:
            return "127.0.0.1"
