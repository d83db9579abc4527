"""What crosses in bfloat16: half the bytes and little precision; what stays in the enclave keeps all of it."""

from __future__ import annotations

import pytest
import torch

from obfuscatune.enclave.local_worker import LocalWorker
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import batch, copy_of, deviation, protected

LLAMA = ARCHITECTURES["llama"]


def gradients(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the embeddings, which every layer's gradient passes on its way to."""
    weight = model.get_input_embeddings().weight.requires_grad_()  # protect freezes it
    (gradient,) = torch.autograd.grad(model(**inputs).logits.square().sum(), [weight])
    return gradient


@pytest.mark.parametrize("knobs", [{}, {"verify": 1.0}])
def test_results_are_bfloat16s(worker: LocalWorker, knobs: dict[str, object]) -> None:
    """To rounding of rows, matrices and products. No false alarm.

    Largest deviations of 25 runs, for mixing is drawn anew: logits 0.023, gradients 0.030.
    """
    plain = LLAMA.build(torch.float32)
    inputs = batch((9, 4), 97).inputs()
    expected, expected_gradient = plain(**inputs).logits, gradients(plain, inputs)
    with protected(copy_of(plain), worker, wire_dtype="bfloat16", **knobs) as model:
        found = model(**inputs).logits
        assert found.dtype == torch.float32
        assert 4e-3 < deviation(expected, found) < 0.05
        assert deviation(expected_gradient, gradients(model, inputs)) < 0.075


@torch.no_grad()
def test_half_the_bytes_cross(worker: LocalWorker) -> None:
    plain = LLAMA.build(torch.float32)
    inputs = batch((32, 9), 97).inputs()
    sent = []
    for wire_dtype in ("model", "bfloat16"):
        with protected(copy_of(plain), worker, wire_dtype=wire_dtype, verify=0.0) as model:
            before = model.protection.stats.bytes_sent
            model(**inputs)
            sent.append(model.protection.stats.bytes_sent - before)
            uploaded = model.protection.stats.bytes_uploaded
        sent.append(uploaded)
    rows, matrices, half_the_rows, half_the_matrices = sent
    assert half_the_matrices == matrices / 2
    assert 0.5 < half_the_rows / rows < 0.52  # and the headers


@torch.no_grad()
def test_what_is_kept_to_re_key_is_not_rounded(worker: LocalWorker) -> None:
    plain = LLAMA.build(torch.float32)
    inputs = batch((9, 4), 97).inputs()
    with protected(copy_of(plain), worker, wire_dtype="bfloat16") as model:
        once = deviation(plain(**inputs).logits, model(**inputs).logits)
        for _ in range(5):
            model.protection.rekey()
        assert deviation(plain(**inputs).logits, model(**inputs).logits) < 2 * once
        W = [layer.weights.weight() for layer in model.protection.offloaded]
    assert all((w - w.bfloat16().float()).abs().max() > 0 for w in W)
