"""A worker on this machine, as a process of its own, for as long as a `with` lasts."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from obfuscatune.wire.errors import ConfigError, ConnectionLost

START_SECONDS = 120.0
"""From starting the process to its ready line: most of it is the import of torch on a busy machine."""
STOP_SECONDS = 15.0
"""From SIGTERM to SIGKILL."""
TAIL_CHARS = 2000


class LocalWorker:
    """A worker process that listens on a unix socket which only this user can open."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.address = f"unix:{folder / 'worker.sock'}"
        self._command = [
            sys.executable,
            "-P",  # else `-m` imports what lies in the folder that we were called in, a data set's torch.py say
            "-m",
            "obfuscatune.worker",
            "--listen",
            self.address,
            "--json",
            "--until-stdin-closes",
        ]
        self._command += arguments
        self._messages = folder / "worker.log"
        self.process = self._start()

    @property
    def pid(self) -> int:
        """Of the worker that runs now."""
        return self.process.pid

    def restart(self) -> None:
        """Kill the worker as the kernel would when out of memory (SIGKILL), and start another at the same address."""
        self.process.kill()
        self._reap()
        self.process = self._start()

    def stop(self) -> None:
        """Have the worker answer what it was asked, and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._reap()

    def messages(self) -> str:
        """The last of what the worker wrote on stderr."""
        return self._messages.read_text(errors="replace")[-TAIL_CHARS:]

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._messages.open("ab") as messages:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,  # closed by the kernel when we die: the worker then ends too
                stdout=subprocess.PIPE,
                stderr=messages,
                start_new_session=True,  # Ctrl-C is for us alone: the worker is still needed to finish in good order
            )
        try:
            self._await_ready(process)
        except BaseException:
            process.kill()
            _close(process)
            raise
        return process

    def _await_ready(self, process: "subprocess.Popen[bytes]") -> None:
        """Read the ready line.

        Raises:
            ConnectionLost: the worker ended, or said something else, or nothing in time.
        """
        if process.stdout is None:
            raise ConfigError("the worker was started without a pipe for its ready line")
        line = _read_line(process.stdout.fileno(), START_SECONDS)
        try:
            ready = json.loads(line)["event"] == "ready"
        except (ValueError, KeyError, TypeError):
            ready = False
        if not ready:
            tail = self.messages().strip() or "nothing"
            raise ConnectionLost(f"the worker did not start; its last words: {tail}")

    def _reap(self) -> None:
        self.process.wait()
        _close(self.process)


@contextmanager
def local_worker(
    *,
    threads: int | None = None,
    dtype: str = "as-sent",
    record: Path | None = None,
    store: Path | None = None,
    device: str = "cpu",
    extra: tuple[str, ...] = (),
) -> Iterator[LocalWorker]:
    """A worker process on this machine; it ends, and its socket is removed, with the `with`.

    Args:
        threads: cores it computes on; None for all.
        dtype: "as-sent", "float32" or "bfloat16": what it keeps matrices and computes in.
        record: folder for the transcript of all that it sees.
        store: folder in which it keeps matrices from one run to the next.
        device: "cpu", "cuda" or "cuda:N".
        extra: further options of `python -m obfuscatune.worker`.

    Raises:
        ConnectionLost: it did not start; the message holds the end of its stderr.
    """
    arguments = ["--dtype", dtype, "--device", device, *extra]
    for option, value in (("--threads", threads), ("--record", record), ("--store", store)):
        if value is not None:
            arguments += [option, str(value)]
    with tempfile.TemporaryDirectory(prefix="obfuscatune-") as folder:  # made with mode 0700
        worker = LocalWorker(Path(folder), arguments)
        try:
            yield worker
        finally:
            worker.stop()


def _close(process: "subprocess.Popen[bytes]") -> None:
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _read_line(descriptor: int, seconds: float) -> bytes:
    """Bytes up to a newline, the end, or until the time is over."""
    line = b""
    until = time.monotonic() + seconds
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while not line.endswith(b"\n") and poll.poll(max(0.0, until - time.monotonic()) * 1000):
        chunk = os.read(descriptor, 4096)
        if not chunk:
            break
        line += chunk
    return line
