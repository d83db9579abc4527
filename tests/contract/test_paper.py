"""The paper's scheme and the enclave alone, against plain, for every architecture, in float64: the same numbers.

Tolerances as in test_exactness.py; what is not orthogonal amplifies rounding by its condition number, squared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from obfuscatune import protect
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ConfigError, ProtectionError
from tests.contract.architectures import ARCHITECTURES, Architecture
from tests.contract.comparison import KEY, backward, batch, copy_of, deviation, greedy, largest_deviation, protected
from tests.contract.comparison import with_lora as adapted

pytestmark = pytest.mark.usefixtures("float64_throughout")

LLAMA = ARCHITECTURES["llama"]
TRANSFORMS = {"haar": 1e-9, "structured": 1e-9, "conditioned(160)": 1e-9, "gaussian": 1e-6}
READS = {"q_proj", "query", "c_attn", "query_key_value", "gate_proj", "c_fc", "fc1", "dense_h_to_4h", "intermediate"}


@torch.no_grad()
def test_logits(architecture: Architecture, plain: Any, worker: LocalWorker) -> None:
    inputs = batch((13, 4, 9), plain.config.vocab_size)
    expected = inputs.attended(plain(**inputs.inputs()).logits)
    with protected(copy_of(plain), worker, profile="paper") as model:
        assert deviation(expected, inputs.attended(model(**inputs.inputs()).logits)) < 1e-9


def test_one_side_of_every_layer(architecture: Architecture, plain: Any, worker: LocalWorker) -> None:
    """What reads the residual stream has plain outputs, what writes to it plain inputs; and nothing has both plain."""
    with protected(copy_of(plain), worker, profile="paper") as model:
        layers = model.protection.offloaded
        for layer in layers:
            leaf = layer.name.rpartition("+")[0] or layer.name
            reads = any(part in READS for part in leaf.replace("+", ".").split("."))
            assert layer.side == ("reads" if reads else "writes"), layer.name
            is_plain = layer.R_in.name == "identity", layer.R_out.name == "identity"
            assert is_plain == ((False, True) if reads else (True, False))
        assert {layer.side for layer in layers} == {"reads", "writes"}


@pytest.mark.parametrize(("transform", "tolerance"), TRANSFORMS.items())
def test_every_transform(worker: LocalWorker, transform: str, tolerance: float) -> None:
    inputs = batch((9, 4), 97)
    expected_loss, expected = backward(adapted(LLAMA.build(torch.float64)), inputs)
    with protected(LLAMA.build(torch.float64), worker, profile="paper", transform=transform) as model:
        loss, found = backward(adapted(model), inputs)
    assert deviation(expected_loss, loss) < tolerance
    assert largest_deviation(expected, found) < tolerance


def test_generation(worker: LocalWorker) -> None:
    plain = LLAMA.build(torch.float64)
    prompt = batch((6,), 97)
    with protected(copy_of(plain), worker, profile="paper") as model:
        assert torch.equal(greedy(model, prompt, tokens=20), greedy(plain, prompt, tokens=20))


@pytest.mark.parametrize("profile", ["paper", "private"])
@torch.no_grad()
def test_rekeying(worker: LocalWorker, profile: str) -> None:
    """Other matrices on the worker, the same numbers, and the old matrices forgotten."""
    plain = LLAMA.build(torch.float64)
    inputs = batch((9, 4), 97).inputs()
    with protected(copy_of(plain), worker, profile=profile) as model:
        protection = model.protection
        before = [(layer.matrix_id, layer.R_in, layer.R_out) for layer in protection.offloaded]
        for epoch in (1, 2):
            protection.rekey()
            assert {layer.epoch for layer in protection.offloaded} == {epoch}
            assert deviation(plain(**inputs).logits, model(**inputs).logits) < 1e-9
        for layer, (matrix_id, R_in, R_out) in zip(protection.offloaded, before, strict=True):
            assert layer.matrix_id != matrix_id
            assert (layer.R_in is not R_in) and (layer.R_out is not R_out)
            rows = torch.ones(1, layer.R_in.dim, dtype=torch.float64)
            with pytest.raises(ConfigError, match="no matrix was stored"):
                protection.client.multiply(matrix_id, rows, transpose=False)


@torch.no_grad()
def test_the_enclave_alone() -> None:
    plain = LLAMA.build(torch.float64)
    inputs = batch((9, 4), 97).inputs()
    model = protect(copy_of(plain), None, "enclave", key=KEY)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert model.protection.stats.crossings == 0
    with pytest.raises(ProtectionError, match="offloads nothing"):
        protect(copy_of(plain), None, "enclave").protection._worker  # noqa: B018


def test_a_worker_is_named_where_none_is_needed() -> None:
    with pytest.raises(ConfigError, match="profile 'enclave'"):
        protect(LLAMA.build(torch.float64), "unix:/nowhere", "enclave")


@torch.no_grad()
def test_a_worker_is_started_where_none_is_named() -> None:
    """Which holds the matrices, and the adapter under this profile, and ends with the model."""
    plain = LLAMA.build(torch.float64)
    inputs = batch((9, 4), 97).inputs()
    with protect(adapted(copy_of(plain)), None, "paper", key=KEY) as model:
        crossed = model(**inputs).logits
        assert model.protection.stats.crossings > 0
        assert deviation(adapted(copy_of(plain))(**inputs).logits, crossed) < 1e-10
