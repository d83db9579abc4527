"""How much work a LoRA step or a forward pass is, plain and protected, counted from a model's shape alone.

shape  ->  model without weights  ->  run on torch's `meta` device, which computes nothing  ->  operations and bytes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from obfuscatune.bench.products import ProductCounter
from obfuscatune.bench.shapes import config_of
from obfuscatune.bench.workload import LORA
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.mixer import KroneckerMixer
from obfuscatune.enclave.plan import LayerPlan, make_plan
from obfuscatune.enclave.profiles import Profile
from obfuscatune.tuning.adapter import without_peft_warnings
from obfuscatune.wire.errors import ConfigError

WORKS = ("step", "forward")


@dataclass(frozen=True)
class Work:
    """Of one step or pass; operations are floating-point operations of matrix products."""

    plain_flops: float
    other_bytes: float
    """Written by everything that is no product: the same for plain and protected."""
    enclave_flops: float
    """Of the products that stay, of the plain ones."""
    worker_flops: float
    """Of the products that a worker computes, with the rows that are mixed in."""
    crossings: int
    crossing_bytes: float
    """To the worker and back."""


def count_work(work: str, shape: str, layers: int | None, batch: int, length: int, profile: Profile) -> Work:
    """What `bench step` or `bench forward` of that shape does. Seconds, and no memory, for models of any size.

    Raises:
        ConfigError: an unknown shape, other work, or a profile that trains adapters on the worker.
    """
    if work not in WORKS:
        raise ConfigError(f"work is counted of {' and '.join(WORKS)}, not of {work!r}")
    if profile.lora_on == "worker":
        raise ConfigError("the cost model has LoRA in the enclave: use a profile such as private or guarded")
    config = config_of(shape, layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        plan = make_plan(model, profile)
        ids = torch.zeros(batch, length, dtype=torch.long)
        if work == "step":
            with without_peft_warnings():
                tuned = get_peft_model(model, LoraConfig(**LORA)).train()
            with ProductCounter() as counter:
                tuned(input_ids=ids, labels=ids).loss.backward()
        else:
            with torch.inference_mode(), ProductCounter() as counter:
                model.eval()(input_ids=ids)
    rows, count_rows = batch * length, _row_counter(profile)
    moved, computed, crossings, crossed = 0.0, 0.0, 0, 0.0
    for layer in plan.layers:
        for width in _widths_sent(layer, backward=work == "step"):
            sent = count_rows(rows, width)
            moved += 2 * rows * layer.parameters
            computed += 2 * sent * layer.parameters
            crossings += 1
            crossed += sent * (layer.p + layer.q) * layer.element_bytes
    return Work(counter.flops, counter.other_nbytes, counter.flops - moved, computed, crossings, crossed)


def _widths_sent(layer: LayerPlan, *, backward: bool) -> list[int]:
    """How wide the rows are of each crossing of a layer."""
    return [layer.p] * layer.forward_crossings + [layer.q] * (layer.backward_crossings if backward else 0)


def _row_counter(profile: Profile) -> Callable[[int, int], int]:
    """How many rows cross for (rows, width): what the profile's mixing makes of them."""
    mixer = KroneckerMixer(profile.shield_rows, SecretStream.fresh(), full_rank=profile.full_rank)

    @cache
    def count(rows: int, width: int) -> int:
        return mixer.draw(rows, width).rows if profile.mixing else rows

    return count
