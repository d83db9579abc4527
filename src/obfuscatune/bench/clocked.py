"""A local worker whose computing is clocked, from the side of the process that starts it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from obfuscatune.bench.clock import ClockPage
from obfuscatune.enclave.local import LocalWorker
from obfuscatune.wire.files import temporary_root


class ClockedWorker(LocalWorker):
    """A `LocalWorker` that runs the same program with a clock on it, and may listen elsewhere."""

    def __init__(self, folder: Path, arguments: list[str], listen: str | None = None) -> None:
        """`folder`: for the clock's page, as long as this lives."""
        page = folder / "clock"
        self.clock = ClockPage(page, create=True)
        super().__init__(arguments, program=("obfuscatune.bench.clocked_worker", str(page)), listen=listen)


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
    with (
        tempfile.TemporaryDirectory(prefix="obfuscatune-bench-", dir=temporary_root()) as folder,
        ClockedWorker(Path(folder), ["--threads", str(threads), *extra], listen) as worker,
    ):
        yield worker
