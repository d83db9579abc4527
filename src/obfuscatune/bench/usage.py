"""Memory and processor time of a process, as the kernel counts them."""

from __future__ import annotations

import os
from pathlib import Path

from obfuscatune.wire.errors import StorageError


def peak_bytes(pid: int | None = None) -> int:
    """The most that was ever resident (VmHWM), of this process or another; since it was executed, not forked.

    Raises:
        StorageError: there is no such process, or this is no Linux.
    """
    return _status("VmHWM", pid)


def settled_bytes(pid: int | None = None) -> int:
    """What is resident now (VmRSS), likewise."""
    return _status("VmRSS", pid)


def cpu_seconds(pid: int | None = None) -> float:
    """What it has computed so far, on all cores, for itself and in the kernel, likewise."""
    utime, stime = _read("stat", pid).rpartition(")")[2].split()[11:13]  # after the name, which may hold blanks
    return (int(utime) + int(stime)) / os.sysconf("SC_CLK_TCK")


def _status(name: str, pid: int | None) -> int:
    return next(
        int(line.split()[1]) * 1024 for line in _read("status", pid).splitlines() if line.startswith(f"{name}:")
    )


def _read(file: str, pid: int | None) -> str:
    path = Path("/proc") / ("self" if pid is None else str(pid)) / file
    try:
        return path.read_text("ascii")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
