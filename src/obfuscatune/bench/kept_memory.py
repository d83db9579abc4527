"""Memory that is given back bit by bit, so that another process is given pages that were in use a moment ago.

A virtual machine takes pages from its host when they are first used, and may hand them back when they are free for some
seconds. To take them costs the one who first writes to them up to some seconds for each gigabyte, whatever it writes.
A process that held them, and lets them go as they are needed, shows what remains on a machine that has its own memory.

run as:  python -m obfuscatune.bench.kept_memory BYTES     says `ready`, then lets go as many bytes as each line says
"""

from __future__ import annotations

import contextlib
import mmap
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

from obfuscatune.errors import ConfigError

PART_BYTES = 128 << 20
AHEAD_BYTES = 512 << 20
"""Let go before it is needed."""
SPARE = 1.5
"""Bytes held for each byte needed: other processes take some of the memory that is released."""
SAMPLE_BYTES = 2 << 30
"""Bytes that are written in a trial."""


class KeptMemory:
    """A process that holds `nbytes` bytes of memory, and releases them part by part."""

    def __init__(self, nbytes: int) -> None:
        """
        Raises:
            ConfigError: there is not so much memory.
        """
        self._nbytes = nbytes
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "obfuscatune.bench.kept_memory", str(nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._process.stdout is not None and not self._process.stdout.readline():
            raise self._ended()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def keep_ahead_of(self, nbytes: int) -> None:
        """So many bytes have been taken by others.

        Raises:
            ConfigError: the process has ended.
        """
        if self._process.stdin is not None:
            try:
                self._process.stdin.write(f"{nbytes + AHEAD_BYTES}\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                raise self._ended() from None

    def _ended(self) -> ConfigError:
        self._process.communicate()
        size, status = self._nbytes / 1e9, self._process.returncode
        return ConfigError(f"the process that kept {size:.1f} GB ended with status {status}: is there so much memory?")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def seconds_for_a_new_byte(nbytes: int) -> float:
    """Seconds per byte for one core to write to `nbytes` of new memory first, in huge pages if possible."""
    started = time.perf_counter()
    memory = _new(max(nbytes, PART_BYTES))
    passed = time.perf_counter() - started
    memory.close()
    return passed / max(nbytes, PART_BYTES)


def _new(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    for place in range(0, nbytes, mmap.PAGESIZE):
        memory[place] = 1
    return memory


def main() -> None:
    """Hold, say so, and let go what is no longer to be held."""
    nbytes = int(sys.argv[1])
    parts = [_new(PART_BYTES) for _ in range(-(-nbytes // PART_BYTES))]
    print("ready", flush=True)  # noqa: T201 - the answer to the parent
    for line in sys.stdin:
        while parts and len(parts) * PART_BYTES > nbytes - int(line):
            parts.pop().close()


if __name__ == "__main__":
    main()
