"""`bench step`, `forward` and `decode`: work protected, under each profile, and plain, in turn, in one run.

Plain runs in its own process at its own best settings: before the contest it tries each way for OpenMP's threads to
wait, and the one with the fastest step stays: what else runs on a machine only adds to a step. Both sides get the same
number of threads. While one works the other is stopped by a signal: waiting threads that spin would take its cores.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal, Self

from obfuscatune.bench.measures import Limits
from obfuscatune.bench.step_result import PLAIN, Side, StepResult
from obfuscatune.bench.workload import shape_name
from obfuscatune.errors import ConfigError
from obfuscatune.report.page import environment

_WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SILENT = {"PYTHONWARNINGS": "ignore", "KINETO_LOG_LEVEL": "99", "TRANSFORMERS_VERBOSITY": "error"}


class BenchProcess:
    """A process that stands still whenever it has nothing to do; it ends with the `with`."""

    def __init__(self, settings: dict[str, Any], waiting: dict[str, str]) -> None:
        """`settings`: see `bench_process.py`; `waiting`: environment variables that say how OpenMP's threads wait.

        Raises:
            ConfigError: it ended; what it said stands on stderr.
        """
        inherited = {name: value for name, value in os.environ.items() if name not in _WAITING_VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "obfuscatune.bench.bench_process", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**inherited, **_SILENT, **waiting, "OMP_NUM_THREADS": str(settings["threads"])},
        )
        self._listen()

    def tell(self, word: str) -> dict[str, Any]:
        """What it answers to a word of `bench_process.py`."""
        self._process.send_signal(signal.SIGCONT)
        if self._process.stdin is not None:
            print(word, file=self._process.stdin, flush=True)
        return self._listen()

    def _listen(self) -> dict[str, Any]:
        """The next answer; the process stands still from then on."""
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise ConfigError(f"a bench process ended with status {self._process.wait()}; what it said stands above")
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


OWN_WAITING: dict[str, str] = {}  # as `settle_process` sets it
PLAIN_WAITING = {
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "brief": OWN_WAITING,
}
CALIBRATION_STEPS = 3
CALIBRATION_PASSES = 2
"""Over all ways: a machine has slow minutes, and no way is to have them alone."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class StepBench:
    """What is measured: `work` on `batch` sequences of `length` tokens; `rounds` counted times by each."""

    work: Literal["step", "forward", "decode"] = "step"
    shape: str = "gpt2"
    layers: int | None = None
    batch: int = 2
    length: int = 256
    threads: int = 2
    rounds: int = 7
    warmup: int = 2
    profiles: tuple[str, ...] = ("private",)

    def run(self, progress: Progress) -> StepResult:
        """Measure; several minutes at GPT-2's shapes.

        Raises:
            ConfigError: a bench process could not be started, with what it said.
        """
        waiting = self._best_plain_waiting(progress)
        with ExitStack() as stack:
            processes = {PLAIN: stack.enter_context(self._start(PLAIN, PLAIN_WAITING[waiting]))}
            for profile in self.profiles:
                processes[profile] = stack.enter_context(self._start("protected", OWN_WAITING, profile))
            answers: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
            for round_number in range(self.warmup + self.rounds):
                for name, process in processes.items():
                    answer = process.tell("step")
                    progress(f"round {round_number + 1}/{self.warmup + self.rounds}: {name} {answer['seconds']:.3f} s")
                    if round_number >= self.warmup:
                        answers[name].append(answer)
            sides = {name: Side(answers[name], *_inspected(processes[name])) for name in processes}
            limits = Limits(**processes[PLAIN].tell("limits"))
        settings = asdict(self) | {"shape": shape_name(self.shape)}
        return StepResult(settings, waiting, sides.pop(PLAIN), sides, limits, environment(self.threads))

    def _best_plain_waiting(self, progress: Progress) -> str:
        if len(PLAIN_WAITING) == 1:
            return next(iter(PLAIN_WAITING))
        fastest = dict.fromkeys(PLAIN_WAITING, math.inf)
        for name in [*PLAIN_WAITING] * CALIBRATION_PASSES:
            with self._start(PLAIN, PLAIN_WAITING[name]) as plain:
                plain.tell("step")
                seconds = min(plain.tell("step")["seconds"] for _ in range(CALIBRATION_STEPS))
            fastest[name] = min(fastest[name], seconds)
            progress(f"plain, OpenMP waiting {name}: {seconds:.3f} s")
        return min(fastest, key=lambda name: fastest[name])

    def _start(self, kind: str, waiting: dict[str, str], profile: str | None = None) -> BenchProcess:
        wanted = ("work", "shape", "layers", "batch", "length", "threads")
        settings = {name: getattr(self, name) for name in wanted}
        return BenchProcess(settings | {"kind": kind, "profile": profile}, waiting)


def _inspected(process: BenchProcess) -> tuple[dict[str, float], dict[str, int]]:
    """Where its time goes, and the products that it computes; after all that is timed."""
    process.tell("profile")  # the first starts the profiler
    return process.tell("profile")["spans"], process.tell("count")
