"""A protected LoRA step over a plain one, by size: `bench step` with the preset's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from obfuscatune.bench.step import StepBench
from obfuscatune.machine import cores
from obfuscatune.reproduction.share import PROFILES
from obfuscatune.reproduction.cells import Cell, Watch
from obfuscatune.reproduction.methods import find_method
from obfuscatune.reproduction.presets import Preset, ShapeDepth



def slowdown_cell(preset: Preset, shape: ShapeDepth, profile: str) -> Cell:
    """One shape under one profile, plain beside it in the same run."""
    bench = StepBench(
        shape=shape.shape,
        layers=shape.layers,
        batch=preset.step_batch,
        length=preset.step_length,
        threads=cores(),
        rounds=preset.slowdown_rounds,
        warmup=1 if preset.slowdown_rounds < 3 else 2,
        profiles=(profile,),
    )

    def measure(watch: Watch) -> Mapping[str, Any]:
        with watch(f"timing {shape.shape}, {profile}") as meter:
            document = bench.run(lambda line: meter.advance(1, line)).as_json()
        plain, protected = document["plain"], document["protected"][profile]
        return {"plain_seconds": plain["seconds"], "protected_seconds": protected["seconds"], **protected}

    settings = {name: getattr(bench, name) for name in ("shape", "layers", "batch", "length", "threads", "rounds")}
    settings |= {"profile": profile, "protection": find_method(profile).resolved}
    return Cell("slowdown", f"{shape.shape} {profile}", settings, measure)
