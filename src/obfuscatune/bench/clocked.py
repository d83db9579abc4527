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
    """A `LocalWorker` that runs the same program with a clock on it, and may listen elsewhere."""

    def __init__(self, folder: Path, arguments: list[str], listen: str | None = None) -> None:
        self._page_path = folder / "clock"
        self._listen = listen
        self.clock = ClockPage(self._page_path, create=True)
        super().__init__(folder, arguments)

    def _start(self) -> subprocess.Popen[bytes]:
        if _PLAIN_MODULE in self._command:
            at = self._command.index(_PLAIN_MODULE)
            self._command[at : at + 1] = [_CLOCKED_MODULE, str(self._page_path)]
        if self._listen is not None:
            self._command[self._command.index(self.address)] = self._listen
            self.address, self._listen = self._listen, None
        return super()._start()


@contextmanager
def clocked_worker(threads: int, listen: str | None = None, extra: tuple[str, ...] = ()) -> Iterator[ClockedWorker]:
    """A worker process on this machine; it ends with the `with`.

    Args:
        threads: that it computes with.
        listen: its address; a unix socket of its own if None.
        extra: further options of `python -m obfuscatune.worker`.

    Raises:
        ConnectionLost: it did not start; the message holds the end of its stderr.
    """
    with tempfile.TemporaryDirectory(prefix="obfuscatune-bench-") as folder:  # made with mode 0700
        worker = ClockedWorker(Path(folder), ["--threads", str(threads), *extra], listen)
        try:
            yield worker
        finally:
            worker.stop()
