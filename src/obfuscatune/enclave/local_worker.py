"""A worker on this machine, as a process of its own, for as long as the object lives."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from obfuscatune.errors import ConfigError, ConnectionLost, StorageError
from obfuscatune.process import begin_anew_in_children
from obfuscatune.protocol.files import temporary_root

START_SECONDS = 120.0
"""From starting the process to its ready line: most of it is the import of torch on a busy machine."""
STOP_SECONDS = 15.0
"""From SIGTERM to SIGKILL."""
TAIL_CHARS = 2000
WORKER_MODULE = "obfuscatune.worker"
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""What binds OpenMP's threads to cores: enclave and worker would be bound to the same ones."""


class LocalWorker:
    """A worker process that listens on a unix socket which only this user can open.

    It ends with `close`, with the `with` around it, when nothing refers to this object any more, or with this process,
    however that ends. A forked child can use the worker, and leaves it running.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        program: tuple[str, ...] = (WORKER_MODULE,),
        listen: str | None = None,
        within: tuple[str, ...] = (),
    ) -> None:
        """Start it.

        Args:
            arguments: options of `python -m obfuscatune.worker`.
            program: the module that runs, and what it takes before the worker's arguments.
            listen: its address; a unix socket in a folder of its own if None.
            within: a command that runs the command line after it in its own place, as `ip netns exec NAME` does.

        Raises:
            ConnectionLost: it did not start; the message holds the end of its stderr.
            StorageError: there is no folder for its socket.
        """
        folder = _make_folder()
        try:
            address = listen or f"unix:{folder / 'worker.sock'}"
            self._worker = _Process(folder, [*program, *arguments], address, within)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._end = weakref.finalize(self, self._worker.end)

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._worker.address

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The worker that runs now, or ran last."""
        return self._worker.running

    @property
    def pid(self) -> int:
        """Process id of the worker that runs now."""
        return self.process.pid

    def restart(self) -> None:
        """Kill the worker as the kernel would when out of memory (SIGKILL), and start another at the same address.

        Raises:
            ConfigError: in a forked child, whose parent's worker it is.
            ConnectionLost: it did not start.
        """
        self._worker.restart()

    def close(self) -> None:
        """Have the worker answer what it was asked, and end; remove its socket. Twice is once."""
        self._end()

    def messages(self) -> str:
        """The last of what the worker wrote on stderr."""
        return self._worker.messages()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LocalWorker({self.address!r}, {'running' if self._end.alive else 'closed'})"


def local_worker(
    *,
    threads: int | None = None,
    dtype: str = "as-sent",
    record: Path | None = None,
    store: Path | None = None,
    device: str = "cpu",
    extra: tuple[str, ...] = (),
) -> LocalWorker:
    """Start a worker process on this machine.

    Keep the object: the worker ends with it. `close` ends it sooner, as does a `with` around it.

    Args:
        threads: cores it computes on; None for all.
        dtype: "as-sent", "float32" or "bfloat16": what it keeps matrices and computes in.
        record: folder for the transcript of all that it sees.
        store: folder in which it keeps matrices from one run to the next.
        device: "cpu", "cuda" or "cuda:N".
        extra: further options of `python -m obfuscatune.worker`.

    Raises:
        ConnectionLost: it did not start; the message holds the end of its stderr.
        StorageError: there is no folder for its socket.

    Example:
        >>> worker = obfuscatune.local_worker()
        >>> model = obfuscatune.load("my-model", worker.address)
        >>> worker.close()
    """
    arguments = ["--dtype", dtype, "--device", device, *extra]
    for option, value in (("--threads", threads), ("--record", record), ("--store", store)):
        if value is not None:
            arguments += [option, str(value)]
    return LocalWorker(arguments)


class _Process:
    """The process of a `LocalWorker`, and its folder."""

    def __init__(self, folder: Path, program: list[str], address: str, within: tuple[str, ...]) -> None:
        self.address = address
        self._folder = folder
        self._command = [
            *within,
            sys.executable,
            "-P",  # else `-m` imports what lies in the folder that we were called in, a data set's torch.py say
            "-m",
            *program,
            "--listen",
            address,
            "--json",
            "--until-stdin-closes",
        ]
        self._owner = os.getpid()
        self.running = self._start()
        begin_anew_in_children(self)

    def restart(self) -> None:
        """See `LocalWorker.restart`."""
        if os.getpid() != self._owner:
            raise ConfigError("this worker belongs to the process that started it: start another in this one")
        self.running.kill()
        _reap(self.running)
        self.running = self._start()

    def end(self) -> None:
        """Stop it and remove its folder; in a forked child, do neither."""
        if os.getpid() != self._owner:
            return
        if self.running.poll() is None:
            self.running.send_signal(signal.SIGTERM)
        try:
            self.running.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.running.kill()
        _reap(self.running)
        shutil.rmtree(self._folder, ignore_errors=True)

    def begin_in_child(self) -> None:
        """Let go of the pipes: the worker ends with our parent, though we may live longer."""
        self.running.returncode = 0  # it is no child of ours: there is nothing to wait for
        _close_pipes(self.running)

    def messages(self) -> str:
        """The last of what the worker wrote on stderr."""
        return (self._folder / "worker.log").read_text(errors="replace")[-TAIL_CHARS:]

    def _start(self) -> subprocess.Popen[bytes]:
        """Run the command, and wait until it is ready."""
        with (self._folder / "worker.log").open("ab") as messages, _on_all_cores():
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,  # closed by the kernel when we die: the worker then ends too
                stdout=subprocess.PIPE,
                stderr=messages,
                env={name: value for name, value in os.environ.items() if name not in _BINDING},
                start_new_session=True,  # Ctrl-C is for us alone: the worker is still needed to finish in good order
            )
        try:
            self._await_ready(process)
        except BaseException:
            process.kill()
            _reap(process)
            raise
        return process

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
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


def _make_folder() -> Path:
    root = temporary_root(for_socket=True)
    try:
        return Path(tempfile.mkdtemp(prefix="obfuscatune-", dir=root))  # with mode 0700
    except OSError as error:
        raise StorageError(f"cannot make a folder in {root}: {error.strerror}; set TMPDIR to another") from error


@contextlib.contextmanager
def _on_all_cores() -> Iterator[None]:
    """Within it, what is started may use all of this process's cores, though OpenMP bound this thread to one."""
    if not any(name in os.environ for name in _BINDING):
        yield
        return
    from obfuscatune.native import bound_cores  # imports torch, which who only starts workers need not have in memory

    cores = bound_cores()
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _reap(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    _close_pipes(process)


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
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
