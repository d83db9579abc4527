"""`bench memory`: many protected steps of a small model, and what both processes hold in memory after each.

What a step takes is given back after it. Both heaps still grow for some hundreds of steps, until they have room for
what is only done now and then, as renewing the secrets of one layer; then they come to rest, and what goes on growing
is a leak. So a line is fitted to the second half of the samples, for each process.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from obfuscatune.assets import tiny_model_path
from obfuscatune.bench.processes import Progress
from obfuscatune.bench.step import BenchProcess
from obfuscatune.bench.workload import shape_name
from obfuscatune.report.charts import Chart, Series
from obfuscatune.report.page import environment, format_bytes, markdown_table

PROCESSES = ("enclave", "worker")
ALLOWED_BYTES = 4 << 20
"""That the fitted line may rise from half-way to the end: heaps grow by single blocks of some MB. A step that kept one
activation of the embedded model, 2 x 64 x 256 float32 numbers, would add 66 MB in 500 steps."""
_KEPT_SAMPLES = 200
_EVERY = 50
"""Steps between two lines of progress."""


@dataclass(frozen=True)
class MemoryBench:
    """What is measured: `steps` LoRA steps after `warmup` others, under each profile."""

    shape: str = field(default_factory=lambda: str(tiny_model_path() / "config.json"))
    layers: int | None = None
    batch: int = 2
    length: int = 64
    threads: int = 2
    steps: int = 1000
    warmup: int = 100
    profiles: tuple[str, ...] = ("private",)

    def run(self, progress: Progress) -> MemoryResult:
        """Measure; some minutes with the embedded model's shape.

        Raises:
            ConfigError: a process could not be started, or ended; what it said stands on stderr.
        """
        runs = [self._run(profile, progress) for profile in self.profiles]
        return MemoryResult(asdict(self) | {"shape": shape_name(self.shape)}, runs, environment(self.threads))

    def _run(self, profile: str, progress: Progress) -> MemoryRun:
        wanted = ("shape", "layers", "batch", "length", "threads")
        settings = {name: getattr(self, name) for name in wanted}
        samples: list[tuple[int, int]] = []
        with BenchProcess(settings | {"work": "step", "kind": "protected", "profile": profile}, {}) as process:
            for number in range(self.warmup + self.steps):
                answer = process.tell("step")
                if number >= self.warmup:
                    samples.append((answer["resident_bytes"], answer["worker_resident_bytes"]))
                if number % _EVERY == 0:
                    own, worker = answer["resident_bytes"], answer["worker_resident_bytes"]
                    progress(f"{profile}, step {number}: {format_bytes(own)} enclave, {format_bytes(worker)} worker")
        return MemoryRun(profile, samples)


@dataclass(frozen=True)
class MemoryRun:
    """What both processes held after each step: (enclave, worker), in bytes."""

    profile: str
    samples: list[tuple[int, int]] = field(repr=False)

    def held(self, process: str) -> list[int]:
        """By one of `PROCESSES`, after each step."""
        return [sample[PROCESSES.index(process)] for sample in self.samples]

    def slope(self, process: str) -> float:
        """Bytes a step, of the line fitted to the second half of the samples by least squares."""
        held = np.array(self._settled(process), dtype=np.float64)
        return float(np.polyfit(np.arange(len(held)), held, 1)[0])

    def growth(self, process: str) -> float:
        """Bytes that the line rises from half-way to the last step."""
        return self.slope(process) * (len(self._settled(process)) - 1)

    def _settled(self, process: str) -> list[int]:
        held = self.held(process)
        return held[len(held) // 2 :]

    @property
    def grows(self) -> bool:
        """Whether one of the lines rises by more than `ALLOWED_BYTES`."""
        return any(self.growth(process) > ALLOWED_BYTES for process in PROCESSES)


@dataclass(frozen=True)
class MemoryResult:
    """What was measured."""

    bench: dict[str, Any]
    """The settings of the `MemoryBench`, with the shape's name."""
    runs: list[MemoryRun]
    environment: dict[str, str]

    @property
    def grows(self) -> bool:
        """Whether memory grew under any profile."""
        return any(run.grows for run in self.runs)

    def as_json(self) -> dict[str, Any]:
        """Everything, for the file; of the samples as many as a picture needs."""
        return {
            "bench": self.bench,
            "allowed_bytes": ALLOWED_BYTES,
            "runs": {
                run.profile: {
                    "grows": run.grows,
                    "slope_bytes_a_step": {process: run.slope(process) for process in PROCESSES},
                    "growth_bytes": {process: run.growth(process) for process in PROCESSES},
                    "held_bytes": {process: run.held(process)[:: self._every(run)] for process in PROCESSES},
                    "steps_between_samples": self._every(run),
                }
                for run in self.runs
            },
            "environment": self.environment,
        }

    def picture(self) -> Chart:
        """What each process holds after each step, under each profile."""
        series = [
            Series(
                f"{run.profile}, {process}",
                tuple((float(step), held / 1e6) for step, held in enumerate(run.held(process), start=1)),
            )
            for run in self.runs
            for process in PROCESSES
        ]
        return Chart("Memory by step", series, "steps after the warm-up", "resident, MB", from_zero=True)

    def as_markdown(self) -> str:
        """A row for each profile and process."""
        b = self.bench
        columns = ["profile", "process", "after the first step", "half-way", "after the last"]
        columns += ["second half's line, bytes a step", "rises by", ""]
        rows = []
        for run in self.runs:
            for process in PROCESSES:
                held, grew = run.held(process), run.growth(process)
                sizes = map(format_bytes, (held[0], held[len(held) // 2], held[-1]))
                fate = "grows" if grew > ALLOWED_BYTES else "at rest"
                rows.append(
                    (f"`{run.profile}`", process, *sizes, f"{run.slope(process):+.0f}", format_bytes(grew), fate)
                )
        settings = (
            f"{b['steps']} LoRA steps after {b['warmup']}, {b['shape']}, batch {b['batch']} x {b['length']}, "
            f"{b['threads']} threads."
        )
        return f"{settings}\n\n{markdown_table(columns, rows, text_columns=2)}\n"

    @staticmethod
    def _every(run: MemoryRun) -> int:
        return -(-len(run.samples) // _KEPT_SAMPLES)
