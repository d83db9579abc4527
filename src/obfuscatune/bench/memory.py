"""Memory of a process, as the kernel counts it."""

from __future__ import annotations

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


def _status(name: str, pid: int | None) -> int:
    path = Path("/proc") / ("self" if pid is None else str(pid)) / "status"
    try:
        lines = path.read_text("ascii").splitlines()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
