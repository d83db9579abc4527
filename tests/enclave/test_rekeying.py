"""Secrets renewed while training goes on: a few layers a step, every layer in time, and the numbers stay."""

from __future__ import annotations

import pytest
import torch

from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.enclave.profiles import resolve
from obfuscatune.errors import ConfigError
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import batch, copy_of, deviation, protected

LLAMA = ARCHITECTURES["llama"]


@pytest.mark.parametrize("every", [1, 3, 4, 100])
@torch.no_grad()
def test_all_layers_are_renewed_in_time(worker: LocalWorker, every: int) -> None:
    plain = LLAMA.build(torch.float64)
    inputs = batch((9, 4), 97).inputs()
    with protected(copy_of(plain), worker, rekey_every=every) as model:
        protection = model.protection
        layers = protection.offloaded
        for step in range(1, 2 * every + 1):
            before = [layer.epoch for layer in layers]
            protection.after_step()
            renewed = sum(layer.epoch for layer in layers) - sum(before)
            assert renewed <= -(-len(layers) // every)
            if step % every == 0:
                assert {layer.epoch for layer in layers} == {step // every}
            if step > 8:
                break
        assert deviation(plain(**inputs).logits, model(**inputs).logits) < 1e-9


@torch.no_grad()
def test_what_is_renewed_often_does_not_drift(worker: LocalWorker) -> None:
    """In float32, through 30 renewals, where each would round anew."""
    plain = LLAMA.build(torch.float32)
    inputs = batch((9, 4), 97).inputs()
    with protected(copy_of(plain), worker) as model:
        once = deviation(plain(**inputs).logits, model(**inputs).logits)
        for _ in range(30):
            model.protection.rekey()
        assert deviation(plain(**inputs).logits, model(**inputs).logits) < 3 * once + 1e-6


def test_without_the_knob_nothing_is_renewed(worker: LocalWorker) -> None:
    with protected(LLAMA.build(torch.float64), worker) as model:
        for _ in range(5):
            model.protection.after_step()
        assert {layer.epoch for layer in model.protection.offloaded} == {0}


def test_the_guarded_profile() -> None:
    guarded = resolve("guarded")
    assert (guarded.verify, guarded.masks, guarded.buckets, guarded.first_blocks) == (1.0, True, "ladder", 1)
    for knobs in ({"verify": 1.5}, {"rekey_every": -1}, {"verify": 0.5}, {"mixing": False}, {"buckets": "few"}):
        with pytest.raises(ConfigError):
            resolve("guarded", **knobs)
