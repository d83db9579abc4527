"""Which part of a model's parameters stays in the enclave: counted from its configuration, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM

from obfuscatune.bench.workload import config_of
from obfuscatune.enclave.plan import make_plan
from obfuscatune.enclave.profiles import resolve
from obfuscatune.enclave.skeleton import empty_model
from obfuscatune.reproduction.cells import Cell, Watch
from obfuscatune.reproduction.methods import find_method

SHAPES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PROFILES = ("paper", "private")


def share_cell(shape: str) -> Cell:
    """One shape under both profiles."""

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
