"""The parent's side of a contender: starts its process, and tells it what to do, a word at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

from obfuscatune.wire.errors import ConfigError

_WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SILENT = {"PYTHONWARNINGS": "ignore", "KINETO_LOG_LEVEL": "99", "TRANSFORMERS_VERBOSITY": "error"}


class Contender:
    """A process that stands still whenever it has nothing to do; it ends with the `with`."""

    def __init__(self, settings: dict[str, Any], waiting: dict[str, str]) -> None:
        """`settings`: see `contender.py`; `waiting`: environment variables that say how OpenMP's threads wait.

        Raises:
            ConfigError: it ended; what it said stands on stderr.
        """
        inherited = {name: value for name, value in os.environ.items() if name not in _WAITING_VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "obfuscatune.bench.contender", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**inherited, **_SILENT, **waiting, "OMP_NUM_THREADS": str(settings["threads"])},
        )
        self._listen()

    def tell(self, word: str) -> dict[str, Any]:
        """What it answers to a word of `contender.py`."""
        self._process.send_signal(signal.SIGCONT)
        if self._process.stdin is not None:
            print(word, file=self._process.stdin, flush=True)
        return self._listen()

    def _listen(self) -> dict[str, Any]:
        """The next answer; the process stands still from then on."""
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise ConfigError(f"a contender ended with status {self._process.wait()}; what it said stands above")
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.communicate("quit\n")
