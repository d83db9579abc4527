"""Network namespaces, one for the enclave and one for each worker: machines of their own, as far as packets go.

Each worker's is joined to the enclave's by a cable (veth), which can be pulled. Where this user cannot make them, all
are on loopback, and no cable can be pulled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from obfuscatune.bench.link import free_port
from obfuscatune.bench.network import within

PORT = 7600


@dataclass(frozen=True)
class Place:
    """Where one worker runs."""

    namespace: str | None
    """None on loopback."""
    host: str
    port: int
    cable: str = ""
    """The enclave's end."""

    @classmethod
    def on_loopback(cls) -> Place:
        """At a port that is free."""
        return cls(None, "127.0.0.1", free_port())

    @property
    def within(self) -> tuple[str, ...]:
        """What stands before a command line for it to run there."""
        return within(self.namespace)


@dataclass(frozen=True)
class Star:
    """The places of an enclave and its workers."""

    enclave: str | None
    """Its namespace; None on loopback."""
    workers: tuple[Place, ...]

    @property
    def within(self) -> tuple[str, ...]:
        """What stands before the enclave's command line."""
        return within(self.enclave)

    def plug(self, place: Place, *, is_in: bool) -> None:
        """Pull a worker's cable, or put it in again. What was on its way is lost, and nobody is told."""
        _ip("-n", str(self.enclave), "link", "set", place.cable, "up" if is_in else "down")


@contextmanager
def star(count: int) -> Iterator[Star]:
    """Make the places of `count` workers, and remove them in the end."""
    if not _can_be_made():
        yield Star(None, tuple(Place.on_loopback() for _ in range(count)))
        return
    name = f"fleet-{os.getpid()}"
    with ExitStack() as stack:
        enclave = stack.enter_context(_namespace(f"{name}-e"))
        places = []
        for number in range(count):
            worker = stack.enter_context(_namespace(f"{name}-{number}"))
            ours, theirs = (f"fl{os.getpid() % 10**6}{side}{number}" for side in "ew")
            _ip("link", "add", ours, "netns", enclave, "type", "veth", "peer", "name", theirs, "netns", worker)
            for namespace, end, host in ((enclave, ours, 1), (worker, theirs, 2)):
                _ip("-n", namespace, "address", "add", f"10.178.{number}.{host}/24", "dev", end)
                _ip("-n", namespace, "link", "set", end, "up")
            places.append(Place(worker, f"10.178.{number}.2", PORT, ours))
        yield Star(enclave, tuple(places))


def _can_be_made() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with _namespace(f"fleet-{os.getpid()}-try") as namespace:
            _ip("-n", namespace, "link", "add", "flone", "type", "veth", "peer", "name", "flother")
    except subprocess.CalledProcessError:  # a container without the right, a kernel without veth
        return False
    return True


@contextmanager
def _namespace(name: str) -> Iterator[str]:
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", name)  # its ends of cables go with it, and so do the others


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
