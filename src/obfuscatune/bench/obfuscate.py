"""`bench obfuscate`: a model from its files to under protection, in a fresh process for each transform.

shape  ->  random weights on disk (checkpoint)  ->  for each transform: a process that loads it (loading)  ->  result
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from obfuscatune.bench.checkpoint import write_random_checkpoint
from obfuscatune.bench.kept_memory import SAMPLE_BYTES, SPARE, seconds_for_a_new_byte
from obfuscatune.bench.shapes import config_of
from obfuscatune.report.environment import environment
from obfuscatune.report.units import format_bytes, format_share
from obfuscatune.wire.errors import ConfigError
from obfuscatune.wire.files import temporary_root

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ObfuscateBench:
    """What is measured: a named shape, or the model in a directory; `rounds` processes for each transform."""

    shape: str = "gpt2-xl"
    layers: int | None = None
    model: Path | None = None
    transforms: tuple[str, ...] = ("structured",)
    profile: str = "private"
    first_blocks: int | None = None
    threads: int = 2
    rounds: int = 3
    memory_kept: bool = False
    """Whether a process beside it holds as much memory as is needed, and gives it back as the worker takes it."""

    def run(self, progress: Progress) -> ObfuscateResult:
        """Measure. A shape is first written to the folder for temporary files, and removed in the end.

        Raises:
            StorageError: no room for it there.
            ConfigError: an unknown shape, or a process that failed; what it said stands on stderr.
        """
        if self.model is not None:
            return self._measure(self.model, progress)
        with tempfile.TemporaryDirectory(prefix="obfuscatune-bench-", dir=temporary_root()) as folder:
            write_random_checkpoint(config_of(self.shape, self.layers), Path(folder), progress)
            return self._measure(Path(folder), progress)

    def _measure(self, model: Path, progress: Progress) -> ObfuscateResult:
        rounds: dict[str, list[dict[str, Any]]] = {transform: [] for transform in self.transforms}
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        new_memory = seconds_for_a_new_byte(min(size, SAMPLE_BYTES))
        for number in range(self.rounds):
            for transform, own in rounds.items():
                own.append(self._load(model, transform, int(size * SPARE) if self.memory_kept else 0))
                progress(f"round {number + 1}/{self.rounds}: {transform} {own[-1]['seconds']:.1f} s")
        return ObfuscateResult(self, rounds, environment(self.threads), new_memory)

    def _load(self, model: Path, transform: str, kept_bytes: int) -> dict[str, Any]:
        knobs = {"transform": transform, "first_blocks": self.first_blocks}
        settings = {
            "model": str(model),
            "profile": self.profile,
            "knobs": {name: value for name, value in knobs.items() if value is not None},
            "threads": self.threads,
            "kept_bytes": kept_bytes,
        }
        done = subprocess.run(
            [sys.executable, "-P", "-m", "obfuscatune.bench.loading", json.dumps(settings)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise ConfigError(f"loading ended with status {done.returncode}; what it said stands above")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


@dataclass(frozen=True)
class ObfuscateResult:
    """What was measured; seconds and bytes. Of each transform the fastest round counts: what disturbs only adds."""

    bench: ObfuscateBench
    rounds: dict[str, list[dict[str, Any]]] = field(repr=False)
    environment: dict[str, str]
    new_memory_seconds_per_byte: float
    """Of one core, to write to new memory for the first time; measured before."""

    def best(self, transform: str) -> dict[str, Any]:
        """The round that took the least time."""
        return min(self.rounds[transform], key=lambda answer: float(answer["seconds"]))

    def as_json(self) -> dict[str, Any]:
        """Everything, for the file."""
        model = None if self.bench.model is None else self.bench.model.name
        return {
            "bench": asdict(self.bench) | {"model": model},
            "best": {transform: self.best(transform) for transform in self.rounds},
            "environment": self.environment,
            "new_memory_seconds_per_byte": self.new_memory_seconds_per_byte,
            "rounds": self.rounds,
        }

    def as_markdown(self) -> str:
        """A table with a row for each transform, and what it was measured on."""
        b = self.bench
        name = b.shape if b.model is None else b.model.name
        depth = "" if b.layers is None else f", {b.layers} layers"
        profile = (
            f"`{b.profile}`" if b.first_blocks is None else f"`{b.profile}` with {b.first_blocks} first blocks kept"
        )
        lines = [
            f"Obfuscating {name}{depth}, profile {profile}, float32, {b.threads} threads; best of {b.rounds}.",
            "",
            "| transform | seconds | processor seconds, enclave + worker | reading | transforming | sending "
            "| enclave's peak | worker's peak | sent | stays in the enclave |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for transform in self.rounds:
            it = self.best(transform)
            stages = " | ".join(f"{it['stages'][stage]:.1f}" for stage in ("reading", "transforming", "sending"))
            cpu = f"{it['enclave_cpu_seconds']:.1f} + {it['worker_cpu_seconds']:.1f}"
            share = it["enclave_parameters"] / it["parameters"]
            lines.append(
                f"| {transform} | **{it['seconds']:.1f}** | {cpu} | {stages} "
                f"| {format_bytes(it['enclave_peak_bytes'])} | {format_bytes(it['worker_peak_bytes'])} "
                f"| {format_bytes(it['bytes_uploaded'])} | {format_bytes(it['enclave_bytes'])}, {format_share(share)} |"
            )
        taken = max(self.best(transform)["bytes_uploaded"] for transform in self.rounds)
        of_new_memory = self.new_memory_seconds_per_byte * taken
        lines += [
            "",
            f"To take {format_bytes(taken)} of new memory costs one core {of_new_memory:.1f} s here.",
        ]
        if b.memory_kept:
            lines.append("A process beside it held as much, and gave it back as the worker took it.")
        lines += ["", ", ".join(f"{name} {value}" for name, value in self.environment.items()), ""]
        return "\n".join(lines)
