"""`bench obfuscate`: a model from its files to under protection, in a fresh process for each transform.

shape  ->  random weights on disk, one shard after the other  ->  for each transform: a process that loads it (loading)
       ->  result
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from obfuscatune.bench.kept_memory import SAMPLE_BYTES, SPARE, seconds_for_a_new_byte
from obfuscatune.bench.processes import Progress, run_module, scratch_folder
from obfuscatune.bench.workload import config_of
from obfuscatune.enclave.checkpoint import weights_names
from obfuscatune.errors import StorageError
from obfuscatune.report.page import environment, format_bytes, format_share, markdown_table

SHARD_BYTES = 1_000_000_000
"""Most bytes of one file, and so of what the writer holds in memory; one tensor alone may exceed it."""
SPARE_BYTES = 1_000_000_000
"""Left free on the disk: what a full disk breaks is other people's work."""
STANDARD_DEVIATION = 0.02  # as GPT-2 is initialised
_SEED = 0
_SIZES = ("enclave_peak_bytes", "enclave_anonymous_peak_bytes", "worker_peak_bytes", "bytes_uploaded")

_Shapes = dict[str, torch.Size]


def write_random_checkpoint(
    config: PretrainedConfig, folder: Path, progress: Progress, dtype: torch.dtype = torch.float32
) -> None:
    """`config.json` and safetensors of a causal language model with that configuration, block by block.

    Raises:
        StorageError: the disk has no room for it.
    """
    shards = list(_sharded(_shapes(config), dtype))
    _check_room(folder, sum(_size(shape, dtype) for shard in shards for shape in shard.values()))
    generator = torch.Generator().manual_seed(_SEED)
    index: dict[str, str] = {}
    single, _, index_file = weights_names()
    for number, shard in enumerate(shards, start=1):
        name = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {tensor: _draw(shape, generator, dtype) for tensor, shape in shard.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
        progress(f"wrote {name}, {number} of {len(shards)}")
    if len(shards) > 1:
        (folder / index_file).write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    config.dtype = dtype
    config.save_pretrained(folder)


def _shapes(config: PretrainedConfig) -> _Shapes:
    """The parameters of the model by name; what is tied once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _sharded(shapes: _Shapes, dtype: torch.dtype) -> Iterator[_Shapes]:
    shard: _Shapes = {}
    for name, shape in shapes.items():
        if shard and sum(_size(it, dtype) for it in shard.values()) + _size(shape, dtype) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _size(shape: torch.Size, dtype: torch.dtype) -> int:
    return shape.numel() * dtype.itemsize


def _draw(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype).normal_(0.0, STANDARD_DEVIATION, generator=generator)


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise StorageError(
            f"{folder} has {free} bytes free, the model takes {size} and {SPARE_BYTES} are to be left: "
            "set TMPDIR to another disk, ask for fewer --layers, or give a model that is there with --model"
        )


@dataclass(frozen=True)
class ObfuscateBench:
    """What is measured: a named shape, or the model in a directory; `rounds` processes for each transform."""

    shape: str = "gpt2-xl"
    layers: int | None = None
    model: Path | None = None
    transforms: tuple[str, ...] = ("structured",)
    profile: str = "private"
    first_blocks: int | None = None
    dtype: str = "float32"
    """Of the weights, in the files and in both processes."""
    threads: int = 2
    rounds: int = 3
    memory_kept: bool = False
    """Whether a process beside it holds as much memory as is needed, and gives it back as the worker takes it."""
    workers: int = 1
    """Of each party; several are a fleet, and share the columns."""

    def run(self, progress: Progress) -> ObfuscateResult:
        """Measure. A shape is first written to the folder for temporary files, and removed in the end.

        Raises:
            StorageError: no room for it there.
            ConfigError: an unknown shape, or a process that failed; what it said stands on stderr.
        """
        if self.model is not None:
            return self._measure(self.model, progress)
        with scratch_folder() as folder:
            write_random_checkpoint(config_of(self.shape, self.layers), Path(folder), progress, self._dtype)
            return self._measure(Path(folder), progress)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

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
            "dtype": self.dtype,
            "knobs": {name: value for name, value in knobs.items() if value is not None},
            "threads": self.threads,
            "workers": self.workers,
            "kept_bytes": kept_bytes,
        }
        return run_module("obfuscatune.bench.loading", json.dumps(settings))


@dataclass(frozen=True)
class ObfuscateResult:
    """What was measured; seconds and bytes. Of each transform the fastest round counts: what disturbs only adds."""

    bench: ObfuscateBench
    rounds: dict[str, list[dict[str, Any]]] = field(repr=False)
    environment: dict[str, str]
    new_memory_seconds_per_byte: float
    """Seconds per byte for one core to write to new memory for the first time, measured before the rounds."""

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
        columns = ["transform", "seconds", "processor seconds, enclave + worker", "reading", "transforming", "sending"]
        columns += ["enclave's peak", "of it anonymous", "worker's peak", "sent", "stays in the enclave"]
        rows = []
        for transform in self.rounds:
            it = self.best(transform)
            share = format_share(it["enclave_parameters"] / it["parameters"])
            rows.append(
                (
                    transform,
                    f"**{it['seconds']:.1f}**",
                    f"{it['enclave_cpu_seconds']:.1f} + {it['worker_cpu_seconds']:.1f}",
                    *(f"{it['stages'][stage]:.1f}" for stage in ("reading", "transforming", "sending")),
                    *(format_bytes(it[name]) for name in _SIZES),
                    f"{format_bytes(it['enclave_bytes'])}, {share}",
                )
            )
        taken = max(self.best(transform)["bytes_uploaded"] for transform in self.rounds)
        cost = self.new_memory_seconds_per_byte * taken
        kept = "\nA process beside it held as much, and gave it back as the worker took it." if b.memory_kept else ""
        fleet = "" if b.workers == 1 else f", {b.workers} workers of each party (the largest peak of them)"
        parts = (
            f"Obfuscating {name}{depth}, profile {profile}, {b.dtype}, {b.threads} threads{fleet}; best of {b.rounds}.",
            markdown_table(columns, rows),
            f"To take {format_bytes(taken)} of new memory costs one core {cost:.1f} s here.{kept}",
            ", ".join(f"{name} {value}" for name, value in self.environment.items()),
        )
        return "\n\n".join(parts) + "\n"
