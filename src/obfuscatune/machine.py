"""What this process may use of the machine it runs on. Shared; imports nothing of the package.

A container is given a part of its host's cores and memory (Linux, cgroup v2), and the usual calls report the host's:
threads by that number wait for each other on few cores, and memory by it ends with the kernel killing the process.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


def refusal() -> str | None:
    """Why nothing works on this system, in one line; None where it does."""
    if sys.platform == "win32":
        return "ObfuscaTune runs on Linux, and without shared memory on macOS; on Windows use it in WSL"
    return None


@dataclass(frozen=True)
class Limits:
    """The limits of a container; None for no limit. `cores`: CPU seconds per second of time."""

    cores: float | None
    memory_bytes: int | None


def cores() -> int:
    """Cores that this process may compute on: those that it is bound to, and no more than its container is given."""
    bound_to = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = container_limits().cores
    return bound_to if limit is None else max(1, min(bound_to, math.ceil(limit)))


def memory_bytes() -> int:
    """Memory of the machine, or of the container where that has less."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = container_limits().memory_bytes
    return installed if limit is None else min(installed, limit)


def container_limits(root: Path = Path("/")) -> Limits:
    """The smallest limits of this process's control group and of those around it.

    Args:
        root: what lies under it is read; another one than / is for tests.
    """
    groups = list(_groups(root))
    quotas = [_quota(text) for text in _contents(groups, "cpu.max")]
    sizes = [int(text) for text in _contents(groups, "memory.max") if text.isdecimal()]
    return Limits(min((quota for quota in quotas if quota is not None), default=None), min(sizes, default=None))


def _quota(text: str) -> float | None:
    """Cores of a line of cpu.max: CPU time over period, as "200000 100000" µs. None for no limit, "max 100000"."""
    quota, _, period = text.partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _groups(root: Path) -> Iterator[Path]:
    """Folders of this process's control group and of those around it, as far as they can be seen from here."""
    mounts = {"/sys/fs/cgroup": "/"}  # also where mountinfo does not say so: a sandbox may show one by a bind mount
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, kind = line.partition(" - ")
        if kind.split()[:1] == ["cgroup2"]:
            mounted, mount = fields.split()[3:5]
            mounts[mount] = mounted
    own = [line.removeprefix("0::") for line in _lines(root / "proc/self/cgroup") if line.startswith("0::")]
    below = PurePosixPath(own[0] if own else "/")
    for mount, mounted in mounts.items():
        inside = below.relative_to(mounted) if below.is_relative_to(mounted) else PurePosixPath()
        for group in (inside, *inside.parents):
            yield root / mount.lstrip("/") / group


def _contents(groups: list[Path], name: str) -> list[str]:
    return [line for group in groups for line in _lines(group / name)[:1]]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except OSError:  # not on this system, or not for us to read
        return []
