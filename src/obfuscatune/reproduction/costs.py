"""The cells for the cost of protection: the enclave's share of parameters, slowdown of a step, time to obfuscate.

The share is counted exactly, from a configuration. The others are measured by `bench step` and `bench obfuscate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM

from obfuscatune.bench.obfuscate import ObfuscateBench
from obfuscatune.bench.step import StepBench
from obfuscatune.bench.workload import config_of
from obfuscatune.enclave.config import empty_model
from obfuscatune.enclave.plan import make_plan
from obfuscatune.enclave.profiles import resolve
from obfuscatune.machine import cores
from obfuscatune.reproduction.cells import Cell, Watch
from obfuscatune.reproduction.presets import Preset, ShapeDepth, find_method

SHAPES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PROFILES = ("paper", "private")
_OBFUSCATION_ROUNDS = 1


def share_cell(shape: str) -> Cell:
    """How many parameters of one shape stay in the enclave, under each of `PROFILES`."""

    def measure(watch: Watch) -> Mapping[str, Any]:
        with watch(f"counting {shape}"):
            model = empty_model(config_of(shape), AutoModelForCausalLM, None)
            plans = {name: make_plan(model, resolve(name)) for name in PROFILES}
        return {
            "parameters": plans["paper"].parameters,
            "enclave": {name: plan.enclave_parameters for name, plan in plans.items()},
            "share": {name: plan.enclave_share for name, plan in plans.items()},
            "kinds": {name: plan.enclave for name, plan in plans.items()},
        }

    settings = {"shape": shape, "protection": {name: find_method(name).resolved for name in PROFILES}}
    return Cell("share", shape, settings, measure)


def slowdown_cell(preset: Preset, shape: ShapeDepth, profile: str) -> Cell:
    """The time of a step of one shape under one profile, beside plain in the same run; seconds."""
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


def obfuscation_cell(shape: ShapeDepth, profile: str) -> Cell:
    """The time to obfuscate one shape with the transform of one profile."""
    protection = find_method(profile).resolved or {}
    bench = ObfuscateBench(
        shape=shape.shape,
        layers=shape.layers,
        transforms=(protection["transform"],),
        profile=profile,
        threads=cores(),
        rounds=_OBFUSCATION_ROUNDS,
    )

    def measure(watch: Watch) -> Mapping[str, Any]:
        with watch(f"obfuscating {shape.shape}, {profile}") as meter:
            return bench.run(lambda line: meter.advance(1, line)).best(protection["transform"])

    settings = {name: getattr(bench, name) for name in ("shape", "layers", "threads", "rounds", "profile")}
    return Cell("obfuscate", f"{shape.shape} {profile}", {**settings, "protection": protection}, measure)
