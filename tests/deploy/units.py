"""systemd's unit files of deploy/, read, and as much of their sandbox as a process can put on itself.

    python -m tests.deploy.units UNIT COMMAND...

runs a command with the unit's system call filter (by libseccomp), address families, limits, no new privileges, and
no new executable memory. Mounts and users are left out: they need systemd.
"""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
_PR_SET_NO_NEW_PRIVS, _PR_SET_MDWE, _REFUSE_EXEC_GAIN = 38, 65, 1
_ALLOW, _EPERM = 0x7FFF0000, 0x00050000 | 1
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def settings(unit: Path) -> dict[str, list[str]]:
    """The settings of [Service], each with its values in order; an empty value clears those before it."""
    found: dict[str, list[str]] = {}
    text = unit.read_text("utf-8").replace("\\\n", " ").partition("[Service]")[2].partition("[Install]")[0]
    for line in text.splitlines():
        name, separator, value = line.strip().partition("=")
        if separator and not name.startswith("#"):
            found[name] = [*found.get(name, []), value] if value else [""]
    return found


def command(unit: Path) -> list[str]:
    """What the unit runs, in words."""
    (line,) = settings(unit)["ExecStart"]
    return line.split()


@functools.cache
def syscall_sets() -> dict[str, set[str]]:
    """The sets of system calls (`@system-service`), as the installed systemd knows them."""
    listing = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True).stdout
    sets: dict[str, set[str]] = {}
    name = ""
    for line in listing.splitlines():
        word = line.strip()
        if line.startswith("@"):
            name = word
            sets[name] = set()
        elif line.startswith(" ") and word and not word.startswith("#"):
            sets[name].add(word)
    return sets


def _expanded(names: set[str]) -> set[str]:
    sets = syscall_sets()
    return {call for name in names for call in (_expanded(sets[name]) if name.startswith("@") else {name})}


def allowed_syscalls(unit: Path) -> set[str]:
    """What `SystemCallFilter=` leaves: lines add to it, or take away where they begin with ~."""
    allowed: set[str] = set()
    for value in settings(unit)["SystemCallFilter"]:
        names = _expanded(set(value.removeprefix("~").split()))
        allowed = allowed - names if value.startswith("~") else allowed | names
    return allowed


class _Comparison(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def _filter(calls: set[str], families: list[int]) -> None:
    """Allow these system calls alone, and `socket` for these families alone; the rest fails with EPERM."""
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(_EPERM)))
    for call in calls - {"socket"}:
        number = lib.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:
            lib.seccomp_rule_add_array(context, ctypes.c_uint32(_ALLOW), number, 0, None)
    socket = lib.seccomp_syscall_resolve_name(b"socket")
    for family in families:
        only = (_Comparison * 1)(_Comparison(0, 4, family, 0))  # SCMP_CMP_EQ
        lib.seccomp_rule_add_array(context, ctypes.c_uint32(_ALLOW), socket, 1, only)
    if lib.seccomp_load(context) != 0:
        raise OSError("the filter was not taken")


def confine(unit: Path) -> None:
    """Put this process, and what it will execute, into the unit's sandbox."""
    import socket

    found = settings(unit)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError("prctl: no new privileges")
    if found["MemoryDenyWriteExecute"] == ["yes"] and libc.prctl(_PR_SET_MDWE, _REFUSE_EXEC_GAIN, 0, 0, 0):
        raise OSError("prctl: no memory that is written and executed")
    for name, number in (("LimitCORE", resource.RLIMIT_CORE), ("LimitMEMLOCK", resource.RLIMIT_MEMLOCK)):
        for value in found.get(name, []):
            size = int(value.rstrip("KMG")) * _SIZES[value.lstrip("0123456789")]
            _, most = resource.getrlimit(number)
            size = size if most == resource.RLIM_INFINITY else min(size, most)  # raising it takes a privilege
            resource.setrlimit(number, (size, size))
    families = [int(getattr(socket, name)) for name in found["RestrictAddressFamilies"][0].split()]
    _filter(allowed_syscalls(unit) | {"execve"}, families)


def unavailable() -> str | None:
    """Why no sandbox can be put on here; None where it can."""
    try:
        ctypes.CDLL("libseccomp.so.2")
        subprocess.run(["systemd-analyze", "--version"], capture_output=True, check=True)
    except OSError as error:
        return f"needs libseccomp and systemd-analyze: {error}"
    major, minor = (int(part) for part in os.uname().release.split(".")[:2])
    return None if (major, minor) >= (6, 3) else "needs Linux 6.3, for PR_SET_MDWE"


if __name__ == "__main__":
    confine(FOLDER / sys.argv[1])
    os.execv(sys.argv[2], sys.argv[2:])
