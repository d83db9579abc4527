"""`bench step`, `forward` and `decode`: the same work, plain and under each profile, in alternating rounds.

Plain and each profile run in a process of their own, with the same number of threads. While one works the others are
stopped by SIGSTOP: their waiting OpenMP threads may spin, and would take its cores.

Plain runs at its best setting. Before the rounds it is tried with each way for OpenMP's threads to wait, and the way
with the fastest step is kept: the minimum, since other load on the machine only adds time.
"""

from __future__ import annotations

import json
import math
import os
import signal
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from obfuscatune.bench.link import LinkSettings
from obfuscatune.bench.measures import Limits
from obfuscatune.bench.network import Network, within
from obfuscatune.bench.processes import Child, Progress
from obfuscatune.bench.step_result import PLAIN, Side, StepResult
from obfuscatune.bench.workload import shape_name
from obfuscatune.report.page import environment

OWN_WAITING: dict[str, str] = {}
"""Environment variables of the protected processes: none, so that `settle_process` decides how threads wait."""
PLAIN_WAITING = {
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "brief": OWN_WAITING,
}
"""Environment variables of the plain process, by the name of the way to wait."""
CALIBRATION_STEPS = 3
"""Timed steps of each try."""
CALIBRATION_PASSES = 2
"""Tries of each way, one after the other, so that a slow minute of the machine does not hit one way alone."""
_WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SILENT = {"PYTHONWARNINGS": "ignore", "KINETO_LOG_LEVEL": "99", "TRANSFORMERS_VERBOSITY": "error"}


class BenchProcess(Child):
    """A process that runs `bench_process.py`. It is stopped by SIGSTOP between commands, and ends with the `with`."""

    def __init__(self, settings: dict[str, Any], waiting: dict[str, str], namespace: str | None = None) -> None:
        """Start it and wait until its model is built.

        Args:
            settings: the JSON argument of `bench_process.py`.
            waiting: environment variables that say how OpenMP's threads wait.
            namespace: the network namespace that it runs in; None for this process's own.

        Raises:
            ConfigError: the process ended; its error is on stderr.
        """
        inherited = {name: value for name, value in os.environ.items() if name not in _WAITING_VARIABLES}
        env = {**inherited, **_SILENT, **waiting, "OMP_NUM_THREADS": str(settings["threads"])}
        super().__init__("obfuscatune.bench.bench_process", json.dumps(settings), env=env, within=within(namespace))
        self._read_answer()

    def tell(self, word: str) -> dict[str, Any]:
        """Send a command of `bench_process.py`, such as "step"; returns the answer.

        Raises:
            ConfigError: the process ended; its error is on stderr.
        """
        self._process.send_signal(signal.SIGCONT)
        self.say(word)
        return self._read_answer()

    def _read_answer(self) -> dict[str, Any]:
        """Read the next answer, and stop the process."""
        answer: dict[str, Any] = json.loads(self.answer())
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGCONT)
        super().__exit__()


@dataclass(frozen=True)
class StepBench:
    """Times `work` on `batch` sequences of `length` tokens, `rounds` times plain and under each of `profiles`.

    `warmup` further rounds come first and are not counted. `layers` is the model's depth; None for that of `shape`.
    With `masks_ahead` one-time masks are drawn before each round, and what that takes is not counted. `link` is that to
    the workers.
    """

    work: Literal["step", "forward", "decode"] = "step"
    shape: str = "gpt2"
    layers: int | None = None
    batch: int = 2
    length: int = 256
    threads: int = 2
    rounds: int = 7
    warmup: int = 2
    profiles: tuple[str, ...] = ("private",)
    masks_ahead: bool = False
    link: LinkSettings = field(default_factory=LinkSettings)

    def run(self, progress: Progress) -> StepResult:
        """Measure. Takes several minutes at GPT-2's shapes.

        Raises:
            ConfigError: a bench process ended; its error is on stderr. Or the network cannot be made.
        """
        waiting = self._best_plain_waiting(progress)
        with ExitStack() as stack:
            network = stack.enter_context(self.link.network())
            processes = {PLAIN: stack.enter_context(self._start(PLAIN, PLAIN_WAITING[waiting]))}
            for profile in self.profiles:
                processes[profile] = stack.enter_context(self._start("protected", OWN_WAITING, profile, network))
            answers: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
            for round_number in range(self.warmup + self.rounds):
                for name, process in processes.items():
                    answer = process.tell("step")
                    progress(f"round {round_number + 1}/{self.warmup + self.rounds}: {name} {answer['seconds']:.3f} s")
                    if round_number >= self.warmup:
                        answers[name].append(answer)
            sides = {name: Side(answers[name], *_profiled_and_counted(processes[name])) for name in processes}
            limits = Limits(**processes[PLAIN].tell("limits"))
        settings = asdict(self) | {"shape": shape_name(self.shape)}
        return StepResult(settings, waiting, sides.pop(PLAIN), sides, limits, environment(self.threads))

    def _best_plain_waiting(self, progress: Progress) -> str:
        """The key of `PLAIN_WAITING` with the fastest plain step."""
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

    def _start(
        self, kind: str, waiting: dict[str, str], profile: str | None = None, network: Network | None = None
    ) -> BenchProcess:
        wanted = ("work", "shape", "layers", "batch", "length", "threads", "masks_ahead")
        settings = {name: getattr(self, name) for name in wanted}
        settings |= {"kind": kind, "profile": profile, "link": self.link.kind}
        settings["namespace"] = None if network is None else network.worker
        return BenchProcess(settings, waiting, None if network is None else network.enclave)


def _profiled_and_counted(process: BenchProcess) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds by category and counts of the products, each of one more round. Call it after the timed rounds."""
    process.tell("profile")  # the first round also pays for starting the profiler
    return process.tell("profile")["spans"], process.tell("count")
