"""`bench step`, `forward` and `decode`: work protected and plain, in turn, in one run.

Plain runs in its own process at its own best settings: before the contest it tries each way for OpenMP's threads to
wait, and the fastest stays. Both sides get the same number of threads. While one works the other is stopped by a
signal: waiting threads that spin would take its cores.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from obfuscatune.report.environment import environment
from obfuscatune.wire.errors import ConfigError

OWN_WAITING: dict[str, str] = {}  # as `settle_process` sets it
PLAIN_WAITING = {
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "brief": OWN_WAITING,
}
CALIBRATION_STEPS = 3
_WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SILENT = {"PYTHONWARNINGS": "ignore", "KINETO_LOG_LEVEL": "99", "TRANSFORMERS_VERBOSITY": "error"}
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
    profile: str = "private"

    def run(self, progress: Progress) -> StepResult:
        """Measure; several minutes at GPT-2's shapes.

        Raises:
            ConfigError: a contender could not be started, with what it said.
        """
        waiting = self._best_plain_waiting(progress)
        with (
            self._contender("plain", PLAIN_WAITING[waiting]) as plain,
            self._contender("protected", OWN_WAITING) as protected,
        ):
            contenders = {"plain": plain, "protected": protected}
            answers: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
            for round_number in range(self.warmup + self.rounds):
                for name, contender in contenders.items():
                    answer = contender.step()
                    progress(f"round {round_number + 1}/{self.warmup + self.rounds}: {name} {answer['seconds']:.3f} s")
                    if round_number >= self.warmup:
                        answers[name].append(answer)
            protected.profile()  # the first starts the profiler
            profiled = protected.profile()
        return StepResult(self, waiting, answers["plain"], answers["protected"], profiled, environment(self.threads))

    def _best_plain_waiting(self, progress: Progress) -> str:
        medians = {}
        for name, waiting in PLAIN_WAITING.items():
            with self._contender("plain", waiting) as plain:
                plain.step()
                medians[name] = statistics.median(plain.step()["seconds"] for _ in range(CALIBRATION_STEPS))
            progress(f"plain, OpenMP waiting {name}: {medians[name]:.3f} s")
        return min(medians, key=lambda name: medians[name])

    def _contender(self, kind: str, waiting: dict[str, str]) -> Contender:
        settings = {key: value for key, value in asdict(self).items() if key not in ("rounds", "warmup")}
        return Contender({**settings, "kind": kind}, waiting)


class Contender:
    """The parent's side of a contender process."""

    def __init__(self, settings: dict[str, Any], waiting: dict[str, str]) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in _WAITING_VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "obfuscatune.bench.contender", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**inherited, **_SILENT, **waiting, "OMP_NUM_THREADS": str(settings["threads"])},
        )
        self._listen()

    def step(self) -> dict[str, Any]:
        """One timed step."""
        return self._tell("step")

    def profile(self) -> dict[str, Any]:
        """One step under the profiler; its time is not to be compared."""
        return self._tell("profile")

    def _tell(self, word: str) -> dict[str, Any]:
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


@dataclass(frozen=True)
class StepResult:
    """What was measured; seconds and bytes."""

    bench: StepBench
    plain_waiting: str
    plain: list[dict[str, Any]] = field(repr=False)
    protected: list[dict[str, Any]] = field(repr=False)
    profiled: dict[str, Any] = field(repr=False)
    environment: dict[str, str]

    @property
    def plain_seconds(self) -> float:
        """Median of a plain step."""
        return float(statistics.median(answer["seconds"] for answer in self.plain))

    @property
    def protected_seconds(self) -> float:
        """Median of a protected step."""
        return float(statistics.median(answer["seconds"] for answer in self.protected))

    @property
    def ratios(self) -> list[float]:
        """Protected over plain, round by round: what drifts with the machine cancels."""
        return [b["seconds"] / a["seconds"] for a, b in zip(self.plain, self.protected, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def difference(self) -> float:
        """Largest difference between what both sides computed in equal rounds: of a step the loss, in nats."""
        return max(abs(float(a["result"] - b["result"])) for a, b in zip(self.plain, self.protected, strict=True))

    @property
    def breakdown(self) -> dict[str, float]:
        """Where the median protected step goes, in seconds; adds up to it.

        Waiting for the worker was clocked in every round. The enclave's spans come from one profiled step, scaled
        to the median; what is in none of them is the model's own work.
        """
        waiting = statistics.median(answer["waiting_seconds"] for answer in self.protected)
        scale = self.protected_seconds / self.profiled["seconds"]
        spans = {name: seconds * scale for name, seconds in self.profiled["spans"].items()}
        checking = max(spans.pop("wait", 0.0) - waiting, 0.0)
        parts = {"waiting for the worker": waiting, "checking": checking} | spans
        return {**parts, "model and optimizer": self.protected_seconds - sum(parts.values())}

    def as_json(self) -> dict[str, Any]:
        """Everything, for the file."""
        return {
            "bench": asdict(self.bench),
            "plain_waiting": self.plain_waiting,
            "plain_seconds": self.plain_seconds,
            "protected_seconds": self.protected_seconds,
            "ratio": self.ratio,
            "ratios": self.ratios,
            "difference": self.difference,
            "breakdown_seconds": self.breakdown,
            "crossings": self.protected[0]["crossings"],
            "bytes": self.protected[0]["bytes"],
            "peak_bytes": {"plain": self.plain[-1]["peak_bytes"], "enclave": self.protected[-1]["peak_bytes"]},
            "environment": self.environment,
            "rounds": {"plain": self.plain, "protected": self.protected},
        }
