"""Two network namespaces that are joined by a link with a delay and a rate, for as long as a benchmark runs.

Each namespace has one end of the link, a TUN device. Whatever the system of one side sends over it is read here, held
for half of the delay, and written to the other's. So both sides' TCP sees a real network: it measures the round trip,
and keeps its window to it. The kernel does the same with `netem`, which not every one has.

Packets pass with the offsets of their segments (`virtio_net_hdr`), up to 64 KiB at a time, as to a network card that
cuts them itself: else a process in Python could not pass on a gigabit.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.errors import ConfigError

ENCLAVE_HOST, WORKER_HOST = "10.177.0.1", "10.177.0.2"
"""Addresses of the two ends. No other system sees them."""
QUEUED_BYTES = 64 << 20
"""More than both sides' windows hold; what comes beyond is dropped, as a router would."""
LARGEST_PACKET = 1 << 17
"""Bytes: an IP packet with its segments' offsets has at most 64 KiB and some."""
AT_A_TIME = 16
"""Packets read from one side before what is due on the other is written."""
STOP_SECONDS = 10.0
_TUN = "/dev/net/tun"
_PR_SET_TIMERSLACK = 29  # linux/prctl.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # linux/if_tun.h
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_CHECKSUM_AND_SEGMENTS = 0x01 | 0x02 | 0x04
"""TUN_F_CSUM, TUN_F_TSO4 and TUN_F_TSO6: packets may come without checksums, and uncut."""


@dataclass(frozen=True)
class Network:
    """The names of the two namespaces."""

    enclave: str
    worker: str


def within(namespace: str | None) -> tuple[str, ...]:
    """What stands before a command line for it to run in a namespace; nothing for None."""
    return () if namespace is None else ("ip", "netns", "exec", namespace)


@contextmanager
def emulated_network(delay_ms: float, gbit: float | None) -> Iterator[Network]:
    """Make the namespaces and the link, and remove them in the end, also after a failure.

    Args:
        delay_ms: added to each round trip, half of it each way.
        gbit: 10⁹ bits a second each way; None for as much as passes.

    Raises:
        ConfigError: this user or system cannot make them.
    """
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None or not Path(_TUN).exists():
        raise ConfigError(
            f"--delay-ms and --gbit make network namespaces: run as root, with `ip` (iproute2) and {_TUN}; "
            "without them --link takes this machine's own network"
        )
    names = Network(f"obfuscatune-{os.getpid()}-e", f"obfuscatune-{os.getpid()}-w")
    with ExitStack() as stack:
        ends = []
        for side, (namespace, host, peer) in enumerate(
            ((names.enclave, ENCLAVE_HOST, WORKER_HOST), (names.worker, WORKER_HOST, ENCLAVE_HOST))
        ):
            device = f"obft{os.getpid() % 10**7}{'ew'[side]}"
            ends.append(_open_tun(device))
            stack.callback(os.close, ends[-1])
            _ip("netns", "add", namespace)
            stack.callback(_remove, namespace)
            _ip("link", "set", device, "netns", namespace)
            _ip("-n", namespace, "address", "add", host, "peer", peer, "dev", device)
            _ip("-n", namespace, "link", "set", device, "txqueuelen", "10000", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
        stack.enter_context(_passing(Link(ends[0], ends[1], delay_ms / 2000, gbit)))
        yield names


class Link:
    """Passes packets between two descriptors, each way in order."""

    def __init__(self, one: int, other: int, delay_s: float, gbit: float | None) -> None:
        self._other_of = {one: other, other: one}
        self._delay_s = delay_s
        self._bytes_per_second = None if gbit is None else gbit * 1e9 / 8
        self._free_at = {one: 0.0, other: 0.0}
        """When the last packet for each end has left, at the rate."""
        self._due: dict[int, deque[tuple[float, bytes]]] = {one: deque(), other: deque()}
        """For each end: when, and what."""
        self._queued_bytes = 0

    def run(self, stop: int) -> None:
        """Pass packets on until the descriptor `stop` is readable."""
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)  # else this thread is woken 50 microseconds late
        ends = list(self._other_of)
        while True:
            next_due = self._deliver()
            wait = None if next_due is None else max(0.0, next_due - time.monotonic())
            ready, _, _ = select.select([stop, *ends], [], [], wait)
            if stop in ready:
                return
            for end in ready:
                self._take(end)

    def _take(self, end: int) -> None:
        """Read what one side sent."""
        to = self._other_of[end]
        for _ in range(AT_A_TIME):
            try:
                packet = os.read(end, LARGEST_PACKET)
            except BlockingIOError:
                return
            if self._queued_bytes + len(packet) > QUEUED_BYTES:
                continue
            self._queued_bytes += len(packet)
            self._due[to].append((self._leaves_at(to, len(packet)) + self._delay_s, packet))

    def _leaves_at(self, to: int, size: int) -> float:
        now = time.monotonic()
        if self._bytes_per_second is None:
            return now
        self._free_at[to] = max(now, self._free_at[to]) + size / self._bytes_per_second
        return self._free_at[to]

    def _deliver(self) -> float | None:
        """Write what is due; returns when the next packet is."""
        for end, queue in self._due.items():
            while queue and queue[0][0] <= time.monotonic():
                _, packet = queue.popleft()
                self._queued_bytes -= len(packet)
                with contextlib.suppress(OSError):  # a side whose namespace is going away, or is out of memory
                    os.write(end, packet)
        return min((queue[0][0] for queue in self._due.values() if queue), default=None)


@contextmanager
def _passing(link: Link) -> Iterator[None]:
    """Within it a thread passes packets on."""
    readable, writable = os.pipe()
    thread = threading.Thread(target=link.run, args=(readable,), name="link", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.write(writable, b"x")
        thread.join(STOP_SECONDS)
        os.close(writable)
        os.close(readable)


def _open_tun(name: str) -> int:
    """A new TUN device's descriptor; the device goes with it."""
    try:
        descriptor = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"cannot open {_TUN}: {error.strerror}; --delay-ms and --gbit need it") from error
    try:
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode("ascii"), flags))
        fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _CHECKSUM_AND_SEGMENTS)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(f"cannot make a TUN device: {error.strerror}; --delay-ms and --gbit need one") from error
    return descriptor


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)  # noqa: S607 - as the user's PATH has it
    if done.returncode:
        raise ConfigError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip() or done.returncode}")


def _remove(namespace: str) -> None:
    with contextlib.suppress(ConfigError):  # somebody else did
        _ip("netns", "del", namespace)
