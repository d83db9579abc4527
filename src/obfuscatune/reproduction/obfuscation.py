"""How long a model takes from its files to under protection: `bench obfuscate` with the preset's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from obfuscatune.bench.obfuscate import ObfuscateBench
from obfuscatune.machine import cores
from obfuscatune.reproduction.share import PROFILES
from obfuscatune.reproduction.cells import Cell, Watch
from obfuscatune.reproduction.methods import find_method
from obfuscatune.reproduction.presets import ShapeDepth

_ROUNDS = 1


def obfuscation_cell(shape: ShapeDepth, profile: str) -> Cell:
    """One shape under one profile, with that profile's own transform."""
    protection = find_method(profile).resolved or {}
    bench = ObfuscateBench(
        shape=shape.shape,
        layers=shape.layers,
        transforms=(protection["transform"],),
        profile=profile,
        threads=cores(),
        rounds=_ROUNDS,
    )

    def measure(watch: Watch) -> Mapping[str, Any]:
        with watch(f"obfuscating {shape.shape}, {profile}") as meter:
            return bench.run(lambda line: meter.advance(1, line)).best(protection["transform"])

    settings = {name: getattr(bench, name) for name in ("shape", "layers", "threads", "rounds", "profile")}
    return Cell("obfuscate", f"{shape.shape} {profile}", {**settings, "protection": protection}, measure)
