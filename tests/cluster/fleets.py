"""`obfuscatune fleet up` as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from obfuscatune.protocol.certificates import make_identity
from obfuscatune.protocol.files import write_new

SECONDS = 300
"""For anything here: far more than it takes, on a machine that others use too."""


def make_enclave(folder: Path) -> Path:
    """An enclave's identity."""
    certificate, key = make_identity("enclave")
    folder.mkdir()
    (folder / "cert.pem").write_bytes(certificate)
    write_new(folder / "key.pem", key)
    return folder


class Up:
    """A supervisor that runs, and what it says."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.ready: dict[str, Any] = {}
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._threads = [threading.Thread(target=self._read, args=(it,)) for it in (process.stdout, process.stderr)]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: Any) -> None:
        for line in stream:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()

    def wait_for(self, words: str) -> str:
        """The first line, from now on or before, that holds `words`; it is not found again."""
        with self._news:
            found: list[str] = []

            def came() -> bool:
                found[:] = [line for line in self._lines if words in line]
                return bool(found) or self.process.poll() is not None

            assert self._news.wait_for(came, SECONDS), f"nothing said of {words!r}: {self._lines}"
            assert found, f"it ended: {self._lines}"
            self._lines.remove(found[0])
            return found[0]

    def finish(self) -> None:
        self.process.wait(SECONDS)
        for thread in self._threads:
            thread.join(SECONDS)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


def fleet(*arguments: str, python: str = sys.executable, env: dict[str, str] | None = None) -> Any:
    """What a `fleet` command says with --json."""
    command = [python, "-m", "obfuscatune", "fleet", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def up(
    state: Path,
    enclave: Path,
    *options: str,
    python: Sequence[str] = (sys.executable,),
    env: dict[str, str] | None = None,
) -> Iterator[Up]:
    """A fleet, until the `with` ends."""
    arguments = ["--state", str(state), "--peer", str(enclave / "cert.pem"), "--publish", "127.0.0.1:0", "--json"]
    process = subprocess.Popen(
        [*python, "-m", "obfuscatune", "fleet", "up", *arguments, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
    running = Up(process)
    try:
        running.ready = json.loads(running.wait_for('"ready"'))
        yield running
    finally:
        process.terminate()
        running.finish()
