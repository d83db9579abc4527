"""A local worker whose computing is clocked, from the side of the process that starts it."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from obfuscatune.bench.clock import ClockPage
from obfuscatune.enclave.local import LocalWorker

_PLAIN_MODULE, _CLOCKED_MODULE = "obfuscatune.worker", "obfuscatune.bench.clocked_worker"


class ClockedWorker(LocalWorker):
    """A `LocalWorker` that runs the same program with a clock on it."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._page_path = folder / "clock"
        self.clock = ClockPage(self._page_path, create=True)
        super().__init__(folder, arguments)

    def _start(self) -> subprocess.Popen[bytes]:
        at = self._command.index(_PLAIN_MODULE) if _PLAIN_MODULE in self._command else None
        if at is not None:
            self._command[at : at + 1] = [_CLOCKED_MODULE, str(self._page_path)]
        return super()._start()


@contextmanager
def clocked_worker(threads: int) -> Iterator[ClockedWorker]:
    """A worker process on this machine that computes with so many threads; it ends with the `with`.

    Raises:
        ConnectionLost: it did not start; the message holds the end of its stderr.
    """
    with tempfile.TemporaryDirectory(prefix="obfuscatune-bench-") as folder:  # made with mode 0700
        worker = ClockedWorker(Path(folder), ["--threads", str(threads)])
        try:
            yield worker
        finally:
            worker.stop()
