"""`bench step`, `forward` and `decode`: work protected, under each profile, and plain, in turn, in one run.

Plain runs in its own process at its own best settings: before the contest it tries each way for OpenMP's threads to
wait, and the one with the fastest step stays: what else runs on a machine only adds to a step. Both sides get the same
number of threads. While one works the other is stopped by a signal: waiting threads that spin would take its cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

from obfuscatune.bench.contender_process import Contender
from obfuscatune.bench.limits import Limits
from obfuscatune.bench.shapes import shape_name
from obfuscatune.bench.step_result import PLAIN, Side, StepResult
from obfuscatune.report.environment import environment

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
            ConfigError: a contender could not be started, with what it said.
        """
        waiting = self._best_plain_waiting(progress)
        with ExitStack() as stack:
            contenders = {PLAIN: stack.enter_context(self._contender(PLAIN, PLAIN_WAITING[waiting]))}
            for profile in self.profiles:
                contenders[profile] = stack.enter_context(self._contender("protected", OWN_WAITING, profile))
            answers: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
            for round_number in range(self.warmup + self.rounds):
                for name, contender in contenders.items():
                    answer = contender.tell("step")
                    progress(f"round {round_number + 1}/{self.warmup + self.rounds}: {name} {answer['seconds']:.3f} s")
                    if round_number >= self.warmup:
                        answers[name].append(answer)
            sides = {name: Side(answers[name], *_inspected(contenders[name])) for name in contenders}
            limits = Limits(**contenders[PLAIN].tell("limits"))
        settings = asdict(self) | {"shape": shape_name(self.shape)}
        return StepResult(settings, waiting, sides.pop(PLAIN), sides, limits, environment(self.threads))

    def _best_plain_waiting(self, progress: Progress) -> str:
        if len(PLAIN_WAITING) == 1:
            return next(iter(PLAIN_WAITING))
        fastest = dict.fromkeys(PLAIN_WAITING, math.inf)
        for name in [*PLAIN_WAITING] * CALIBRATION_PASSES:
            with self._contender(PLAIN, PLAIN_WAITING[name]) as plain:
                plain.tell("step")
                seconds = min(plain.tell("step")["seconds"] for _ in range(CALIBRATION_STEPS))
            fastest[name] = min(fastest[name], seconds)
            progress(f"plain, OpenMP waiting {name}: {seconds:.3f} s")
        return min(fastest, key=lambda name: fastest[name])

    def _contender(self, kind: str, waiting: dict[str, str], profile: str | None = None) -> Contender:
        wanted = ("work", "shape", "layers", "batch", "length", "threads")
        settings = {name: getattr(self, name) for name in wanted}
        return Contender(settings | {"kind": kind, "profile": profile}, waiting)


def _inspected(contender: Contender) -> tuple[dict[str, float], dict[str, int]]:
    """Where its time goes, and the products that it computes; after all that is timed."""
    contender.tell("profile")  # the first starts the profiler
    return contender.tell("profile")["spans"], contender.tell("count")
