"""A benchmark's processes: how they are started and asked, and what the system tells of their memory and their time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from obfuscatune.errors import ConfigError, StorageError
from obfuscatune.protocol.files import temporary_root

Progress = Callable[[str], None]
"""Called with a line of text after each measurement."""
_END_SECONDS = 60.0
"""For a process to end by itself, once its stdin is closed."""
_SAMPLE_SECONDS = 0.01


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for this user alone, for as long as the `with` lasts."""
    return tempfile.TemporaryDirectory(prefix="obfuscatune-bench-", dir=temporary_root())


def run_module(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m MODULE ARGUMENTS` to its end; the JSON document that it printed.

    Raises:
        ConfigError: it failed; what it said stands on stderr.
    """
    done = subprocess.run(_command(module, arguments), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ConfigError(_ended(module, done.returncode))
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


class Child:
    """`python -m MODULE ARGUMENTS`: a process that answers lines with lines, and ends with its stdin or the `with`."""

    def __init__(
        self, module: str, *arguments: str, env: Mapping[str, str] | None = None, within: Sequence[str] = ()
    ) -> None:
        """Start it.

        Args:
            env: its whole environment; this process's if None.
            within: what stands before the command line; see `network.within`.
        """
        self._module = module
        self._process = subprocess.Popen(
            [*within, *_command(module, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def say(self, line: str) -> None:
        """Send a line.

        Raises:
            ConfigError: the process has ended; what it said stands on stderr.
        """
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise ConfigError(self.last_words(self._process.wait())) from None

    def answer(self) -> str:
        """Wait for the next line. Raises as `say`."""
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            raise ConfigError(self.last_words(self._process.wait()))
        return line

    def last_words(self, status: int) -> str:
        """What the user is told when the process has ended with that status, which it should not have."""
        return _ended(self._module, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def _command(module: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", "-m", module, *arguments]


def _ended(module: str, status: int) -> str:
    return f"{module} ended with status {status}; what it said stands above"


def peak_bytes(pid: int | None = None) -> int:
    """The most that was ever resident (VmHWM), of this process or another; since it was executed, not forked.

    Raises:
        StorageError: there is no such process, or this is no Linux.
    """
    return _status("VmHWM", pid)


def settled_bytes(pid: int | None = None) -> int:
    """Resident memory now (VmRSS), of this process or another. Raises as `peak_bytes`."""
    return _status("VmRSS", pid)


def shared_bytes(pid: int | None = None) -> int:
    """What of that is memory shared with other processes (RssShmem). Raises as `peak_bytes`."""
    return _status("RssShmem", pid)


class MemorySampler:
    """Watches this process's anonymous memory while the `with` lasts: what is mapped from files is not in it.

    Pages of a file are the kernel's to drop when memory is short, and to read again; anonymous ones are not.
    """

    def __init__(self) -> None:
        self.anonymous_bytes = 0
        """The most that was sampled, memory shared with the worker included."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory-sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            over = self._over.wait(_SAMPLE_SECONDS)
            held = _status("RssAnon", None) + _status("RssShmem", None)
            self.anonymous_bytes = max(self.anonymous_bytes, held)
            if over:
                return


def cpu_seconds(pid: int | None = None) -> float:
    """CPU time so far in seconds, user and system, of this process or another. Raises as `peak_bytes`."""
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
