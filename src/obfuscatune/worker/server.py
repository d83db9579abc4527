"""From options to a running worker: accepts enclaves and gives each connection its thread."""

import contextlib
import functools
import json
import logging
import os
import resource
import signal
import sys
import threading
from collections import Counter
from typing import TypeVar

import torch

from obfuscatune.backend import Computer, find_device
from obfuscatune.errors import ConfigError, ConnectionLost, WireError
from obfuscatune.machine import memory_bytes
from obfuscatune.option import parse_size
from obfuscatune.process import compute_without_compiling
from obfuscatune.protocol.endpoints import check_tls, parse_address
from obfuscatune.protocol.limits import HANDSHAKE_SECONDS, MAX_HANDSHAKES, MAX_SESSION_CONNECTIONS
from obfuscatune.protocol.listen import Listener
from obfuscatune.protocol.recorder import Recorder
from obfuscatune.protocol.tls import PinnedTls, TlsConfig
from obfuscatune.protocol.transport import Deadline, SocketTransport
from obfuscatune.worker.connection import Connection, Service
from obfuscatune.worker.handlers import Answerer
from obfuscatune.worker.options import WorkerOptions
from obfuscatune.worker.quota import Quota
from obfuscatune.worker.served import ServedWeights
from obfuscatune.worker.sessions import Sessions
from obfuscatune.worker.store import ContentStore, MatrixStore, WhenFull

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


T = TypeVar("T")
DTYPES: dict[str, torch.dtype | None] = {"as-sent": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
POLICIES: dict[str, WhenFull] = {"refuse": "refuse", "evict": "evict"}
DEFAULT_QUOTA = 0.8
"""Share of the machine's memory, or of its container's: the rest is for requests in flight and the system."""
DESCRIPTORS_OF_ONE = 3
"""Of a connection: the socket, memory that is shared, and a descriptor that is on its way."""
SPARE_DESCRIPTORS = 64
"""For libraries, matrices on disk, the transcript."""


def run(options: WorkerOptions, computer_class: type[Computer] = Computer) -> int:
    """Serve until SIGTERM, SIGINT or (with until_stdin_closes) the end of stdin.

    Returns:
        0 after such an end, 1 when the transcript could not be written any further.

    Raises:
        ConfigError: an option that cannot be used.
    """
    compute_without_compiling()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    _check(options)
    address = parse_address(options.listen)
    tls = _tls(options)
    check_tls(address, tls=tls is not None, plain_tcp=options.unsafe_plain_tcp)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    _make_room_for_descriptors(options.max_sessions)
    when_full = _chosen(POLICIES, options.when_full, "--when-full")
    quota = _quota(options, when_full, 1 if tls is None else tls.peers)
    store = MatrixStore(quota, when_full)
    computer = computer_class(
        find_device(options.device, f"--device {options.device}"), _chosen(DTYPES, options.dtype, "--dtype")
    )
    disk = None if options.store is None else ContentStore(options.store, Quota(_store_bytes(options, quota)))
    served = None if not options.serve_model else ServedWeights(options.serve_model)
    recorder = None if options.record is None else Recorder(options.record)
    listener = Listener(address, tls)
    sessions = Sessions(options.max_sessions, store)
    server = Server(listener, Service(Answerer(store, computer, disk, served), sessions, recorder, listener.stop))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    if options.until_stdin_closes:
        threading.Thread(target=_watch_stdin, args=(server,), name="stdin", daemon=True).start()
    _announce(options, str(listener.address))
    server.serve()
    if recorder is None:
        return 0
    failed = recorder.failed
    recorder.close()
    return 1 if failed else 0


def _check(options: WorkerOptions) -> None:
    """What can be said of the options alone, before anything is opened.

    Raises:
        ConfigError: one of them makes no sense.
    """
    for option, value in (("--threads", options.threads), ("--max-sessions", options.max_sessions)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: 1 or more")
    if options.store_quota is not None and options.store is None:
        raise ConfigError("--store-quota is about the disk of --store: give that too, or leave it out")
    if options.store is not None and options.record is not None and options.store.resolve() == options.record.resolve():
        raise ConfigError(f"--store and --record are both {options.store}: give each a folder of its own")


def _announce(options: WorkerOptions, address: str) -> None:
    if options.json:
        line = json.dumps({"event": "ready", "address": address, "pid": os.getpid()})
    else:
        line = f"ready at {address} (process {os.getpid()}); stop it with Ctrl-C"
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _watch_stdin(server: Server) -> None:
    while os.read(0, 4096):
        pass
    server.stop()


def _tls(options: WorkerOptions) -> PinnedTls | None:
    config = TlsConfig.from_options(options.tls_cert, options.tls_key, options.peer)
    return None if config is None else PinnedTls(config, server=True)


def _quota(options: WorkerOptions, when_full: WhenFull, peers: int) -> Quota:
    """Memory for matrices. Where nothing gives way, each of the pinned peers has its part, so that all have some."""
    total = int(memory_bytes() * DEFAULT_QUOTA) if options.quota is None else _size("--quota", options.quota)
    if options.peer_quota is not None:
        of_one = _size("--peer-quota", options.peer_quota)
        if of_one > total:
            raise ConfigError(f"--peer-quota {options.peer_quota} is more than --quota, which is {total} bytes")
        return Quota(total, of_one)
    return Quota(total, total // peers if when_full == "refuse" else total)


def _store_bytes(options: WorkerOptions, quota: Quota) -> int:
    return quota.total if options.store_quota is None else _size("--store-quota", options.store_quota)


def _size(option: str, text: str) -> int:
    size = parse_size(text)
    if size < 1:
        raise ConfigError(f"{option} {text}: 1 byte or more")
    return size


def _make_room_for_descriptors(sessions: int) -> None:
    """Raise the limit of open files, where it is below what all connections may take.

    Raises:
        ConfigError: the system does not allow that.
    """
    needed = SPARE_DESCRIPTORS + MAX_HANDSHAKES + sessions * MAX_SESSION_CONNECTIONS * DESCRIPTORS_OF_ONE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"--max-sessions {sessions} may take {needed} open files, this system allows {hard}: lower it, or raise "
            "the limit (ulimit -Hn)"
        ) from error


def _chosen(choices: dict[str, T], name: str, option: str) -> T:
    if name not in choices:
        raise ConfigError(f"{option} {name}: choose one of {', '.join(choices)}")
    return choices[name]
