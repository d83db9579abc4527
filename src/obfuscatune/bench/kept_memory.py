"""Memory that is given back bit by bit, so that another process is given pages that were in use a moment ago.

A virtual machine takes pages from its host when they are first used, and may hand them back when they are free for some
seconds. To take them costs the one who first writes to them up to some seconds for each gigabyte, whatever it writes.
A process that held them, and lets them go as they are needed, shows what remains on a machine that has its own memory.

run as:  python -m obfuscatune.bench.kept_memory BYTES     says `ready`, then lets go as many bytes as each line says
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import time

from obfuscatune.bench.processes import Child

PART_BYTES = 128 << 20
AHEAD_BYTES = 512 << 20
"""Let go before it is needed."""
SPARE = 1.5
"""Bytes held for each byte needed: other processes take some of the memory that is released."""
SAMPLE_BYTES = 2 << 30
"""Bytes that are written in a trial."""


class KeptMemory(Child):
    """A process that holds `nbytes` bytes of memory, and releases them part by part."""

    def __init__(self, nbytes: int) -> None:
        """
        Raises:
            ConfigError: there is not so much memory.
        """
        super().__init__("obfuscatune.bench.kept_memory", str(nbytes))
        self._nbytes = nbytes
        self.answer()

    def keep_ahead_of(self, nbytes: int) -> None:
        """So many bytes have been taken by others.

        Raises:
            ConfigError: the process has ended.
        """
        self.say(str(nbytes + AHEAD_BYTES))

    def last_words(self, status: int) -> str:
        """See `Child`."""
        return f"the process that kept {self._nbytes / 1e9:.1f} GB ended with status {status}: is there so much memory?"


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
