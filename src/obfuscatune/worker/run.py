"""From options to a running worker."""

import json
import logging
import os
import resource
import signal
import sys
import threading
from typing import TypeVar

import torch

from obfuscatune.machine import memory_bytes
from obfuscatune.wire.address import parse_address
from obfuscatune.wire.connect import check_tls
from obfuscatune.wire.errors import ConfigError
from obfuscatune.wire.limits import MAX_HANDSHAKES, MAX_SESSION_CONNECTIONS
from obfuscatune.wire.listen import Listener
from obfuscatune.wire.tls import PinnedTls, TlsConfig
from obfuscatune.worker.answer import Answerer
from obfuscatune.worker.compute import Computer
from obfuscatune.worker.connection import Service
from obfuscatune.worker.disk import ContentStore
from obfuscatune.worker.options import WorkerOptions, parse_size
from obfuscatune.worker.quota import Quota
from obfuscatune.worker.recorder import Recorder
from obfuscatune.worker.server import Server
from obfuscatune.worker.sessions import Sessions
from obfuscatune.worker.store import MatrixStore, WhenFull

T = TypeVar("T")
DTYPES: dict[str, torch.dtype | None] = {"as-sent": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
POLICIES: dict[str, WhenFull] = {"refuse": "refuse", "evict": "evict"}
DEFAULT_QUOTA = 0.8
"""Share of the machine's memory, or of its container's: the rest is for requests in flight and the system."""
DESCRIPTORS_OF_ONE = 3
"""Of a connection: the socket, memory that is shared, and a descriptor that is on its way."""
SPARE_DESCRIPTORS = 64
"""For libraries, matrices on disk, the transcript."""


def run(options: WorkerOptions) -> int:
    """Serve until SIGTERM, SIGINT or (with until_stdin_closes) the end of stdin.

    Returns:
        0 after such an end, 1 when the transcript could not be written any further.

    Raises:
        ConfigError: an option that cannot be used.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    _check(options)
    address = parse_address(options.listen)
    tls = _tls(options)
    check_tls(address, tls=tls is not None, plain_tcp=options.unsafe_plain_tcp)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # else parts of a sum are rounded,
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # which verification takes for a lie
    _make_room_for_descriptors(options.max_sessions)
    when_full = _chosen(POLICIES, options.when_full, "--when-full")
    quota = _quota(options, when_full, 1 if tls is None else tls.peers)
    store = MatrixStore(quota, when_full)
    computer = Computer(_device(options.device), _chosen(DTYPES, options.dtype, "--dtype"))
    disk = None if options.store is None else ContentStore(options.store, Quota(_store_bytes(options, quota)))
    recorder = None if options.record is None else Recorder(options.record)
    listener = Listener(address, tls)
    sessions = Sessions(options.max_sessions, store)
    server = Server(listener, Service(Answerer(store, computer, disk), sessions, recorder, listener.stop))
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


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: write cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: write cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: this machine has no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device


def _chosen(choices: dict[str, T], name: str, option: str) -> T:
    if name not in choices:
        raise ConfigError(f"{option} {name}: choose one of {', '.join(choices)}")
    return choices[name]
