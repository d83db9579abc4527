"""The demo's machines: one for each party, with a directory of its own and, where it may, a network of its own.

As root on Linux each is a network namespace, linked to this process's by a pair of virtual interfaces and to nothing
else: parties reach each other through what `Tap` forwards, and no other way. Else all are on 127.0.0.1.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.errors import StorageError

LOOPBACK = "127.0.0.1"
_NETWORKS = 512
"""Of 256 addresses each, in 198.18.0.0/15, which is for tests and is nobody's (RFC 2544)."""
_BLOCK = 16
"""Of networks, for the machines of one demo."""
_SECONDS = 20.0
_PASSED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Machine:
    """Where a party's programs run."""

    name: str
    folder: Path
    host: str
    """Its own address."""
    gateway: str
    """Where it finds what this process listens on."""
    prefix: tuple[str, ...] = ()
    """What runs a command on it."""

    @property
    def environment(self) -> dict[str, str]:
        """Of its programs: nothing of whoever started the demo but what Python needs."""
        passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
        return {**passed, "HOME": str(self.folder), "TMPDIR": str(self.temporary)}

    @property
    def temporary(self) -> Path:
        """Its /tmp."""
        return self.folder / "tmp"


@contextmanager
def machines(folder: Path, names: Sequence[str], *, isolated: bool) -> Iterator[dict[str, Machine]]:
    """A machine for each name, with a directory below `folder` that is its user's alone.

    Args:
        isolated: each in a network namespace, which ends with the `with`. Ask `why_not_isolated` first.

    Raises:
        StorageError: the disk refused, or the system refused a namespace.
    """
    with ExitStack() as stack:
        made = {}
        first = _unused_block() if isolated else 0
        for number, name in enumerate(names, start=first):
            place = folder / name
            try:
                (place / "tmp").mkdir(mode=0o700, parents=True)
                place.chmod(0o700)
            except OSError as error:
                raise StorageError(f"{place}: the disk refused: {error.strerror or error}") from error
            if isolated:
                made[name] = stack.enter_context(_namespace(name, number, place))
            else:
                made[name] = Machine(name, place, LOOPBACK, LOOPBACK)
        yield made


def why_not_isolated() -> str | None:
    """Why there are no network namespaces here; None where there are."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "not root"
    if shutil.which("ip") is None:
        return "no `ip`: install iproute2"
    probe = f"obfuscatune-{os.getpid()}"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "delete", probe)
    except StorageError as error:
        return str(error)
    return None


@contextmanager
def _namespace(name: str, number: int, folder: Path) -> Iterator[Machine]:
    namespace, link = f"obfuscatune-{os.getpid()}-{name}", f"obfuscatune{number}"
    network = _network(number)
    inside = ("ip", "netns", "exec", namespace)
    _ip("netns", "add", namespace)
    try:
        # The interface of this side goes with that of the other, and both with the namespace.
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("address", "add", f"{network}.1/24", "dev", link)
        _ip("link", "set", link, "up")
        _ip("-netns", namespace, "address", "add", f"{network}.2/24", "dev", "eth0")
        _ip("-netns", namespace, "link", "set", "eth0", "up")
        _ip("-netns", namespace, "link", "set", "lo", "up")
        yield Machine(name, folder, f"{network}.2", f"{network}.1", inside)
    finally:
        _ip("netns", "delete", namespace)


def _unused_block() -> int:
    """The first network of a block that this machine has no address in: another demo may run."""
    known = _ip("-brief", "-4", "address")
    for first in range(os.getpid() % _NETWORKS // _BLOCK * _BLOCK, 2 * _NETWORKS, _BLOCK):
        if not any(f" {_network(number % _NETWORKS)}." in known for number in range(first, first + _BLOCK)):
            return first % _NETWORKS
    raise StorageError("no network in 198.18.0.0/15 is unused here")


def _network(number: int) -> str:
    return f"198.{18 + number // 256}.{number % 256}"


def _ip(*arguments: str) -> str:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_SECONDS)  # noqa: S607  root's
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StorageError(f"ip {' '.join(arguments)}: {error}") from error
    if done.returncode:
        raise StorageError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
