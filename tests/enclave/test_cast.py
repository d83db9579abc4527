"""A model cast to a finer dtype after it was protected computes as the plain model so cast: W* is sent once more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import obfuscatune
from obfuscatune.enclave.local_worker import LocalWorker
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import backward, batch, copy_of, deviation, largest_deviation, protected, with_lora

LLAMA = ARCHITECTURES["llama"]
INPUTS = batch((9, 4), 97)
# Of logits and gradients relative to the largest. What a bfloat16 matrix costs is 4e-3 and more.
BOUND = {torch.float32: 2e-5, torch.float64: 1e-6}

Way = Callable[..., tuple[Any, Any]]


@pytest.fixture(params=["protect", "load"])
def made(request: pytest.FixtureRequest, worker: LocalWorker, tmp_path: Path) -> Iterator[Way]:
    """Makes a plain model in a dtype, and it protected."""
    LLAMA.build(torch.float32).save_pretrained(tmp_path)
    models = []

    def make(dtype: torch.dtype, **knobs: Any) -> tuple[Any, Any]:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        told = {"first_blocks": 0, **knobs}
        if request.param == "load":
            models.append(obfuscatune.load(tmp_path, worker.address, dtype=dtype, **told))
        else:
            models.append(obfuscatune.protect(copy_of(plain), worker.address, **told))
        return plain, models[-1]

    yield make
    for model in models:
        model.protection.close()


@contextmanager
def uploads_of(model: Any, matrices: int) -> Iterator[None]:
    """So many matrices are sent within it, and every other is forgotten."""
    before = model.protection.stats.uploads
    yield
    assert model.protection.stats.uploads - before == matrices
    assert len(model.protection.client._driver.matrices) == len(model.protection.offloaded)


@pytest.mark.parametrize("to", BOUND)
@pytest.mark.parametrize("made_in", [torch.bfloat16, torch.float16])
def test_forward_and_gradients(made: Way, made_in: torch.dtype, to: torch.dtype) -> None:
    plain, model = made(made_in, verify=1.0)
    with uploads_of(model, 0):
        model.to(to)
    plain.to(to)
    expected_loss, expected = backward(with_lora(plain).to(to), INPUTS)
    with uploads_of(model, len(model.protection.offloaded)):
        loss, found = backward(with_lora(model).to(to), INPUTS)
        assert deviation(plain(**INPUTS.inputs()).logits, model(**INPUTS.inputs()).logits) < BOUND[to]
    assert deviation(expected_loss, loss) < BOUND[to]
    assert largest_deviation(expected, found) < BOUND[to]


@torch.no_grad()
def test_a_weight_comes_back_exactly(worker: LocalWorker) -> None:
    plain = LLAMA.build(torch.bfloat16)
    with protected(copy_of(plain), worker) as model:
        for layer in model.protection.offloaded:
            W = torch.cat([plain.get_submodule(f"{path}").weight.T for path in paths_of(layer.name)], dim=1)
            assert torch.equal(layer.weights.weight(), W)


def paths_of(name: str) -> list[str]:
    """The layers that are one matrix, from its name."""
    parent, _, names = name.rpartition(".")
    return [f"{parent}.{one}" for one in names.split("+")]


@torch.no_grad()
def test_renewed_afterwards_it_stays_in_the_finer_dtype(made: Way) -> None:
    plain, model = made(torch.bfloat16)
    model.float()
    expected = plain.float()(**INPUTS.inputs()).logits
    for _ in range(2):
        assert deviation(expected, model(**INPUTS.inputs()).logits) < BOUND[torch.float32]
        with uploads_of(model, len(model.protection.offloaded)):
            model.protection.rekey()


@torch.no_grad()
def test_a_worker_that_lost_it_is_sent_the_finer_one(made: Way) -> None:
    plain, model = made(torch.bfloat16, verify=1.0)
    model.float()
    expected = plain.float()(**INPUTS.inputs()).logits
    model(**INPUTS.inputs())
    model.protection.client._driver.begin_in_child()  # connects anew, in a session that has no matrices
    assert deviation(expected, model(**INPUTS.inputs()).logits) < BOUND[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_threads_have_it_sent_once(worker: LocalWorker, context: Callable[[], Any]) -> None:
    plain = LLAMA.build(torch.bfloat16)
    with protected(copy_of(plain), worker) as model:
        model.float()
        expected = plain.float()(**INPUTS.inputs()).logits
        found: list[Tensor] = []

        def ask() -> None:
            with context():
                found.append(model(**INPUTS.inputs()).logits)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        with uploads_of(model, len(model.protection.offloaded)):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(found) == 4
        assert max(deviation(expected, logits) for logits in found) < BOUND[torch.float32]


def test_what_crossed_before_can_still_be_differentiated(worker: LocalWorker) -> None:
    plain = LLAMA.build(torch.bfloat16)
    with protected(copy_of(plain), worker) as model:
        layer, x = model.model.layers[0].mlp.down_proj, torch.ones(3, 67, dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
        layer.float()
        layer(x.float())
        y.sum().backward()
    assert x.grad is not None
    assert deviation(plain.model.layers[0].mlp.down_proj.weight.sum(0).expand(3, -1), x.grad) < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_a_coarser_dtype_sends_nothing_again(made: Way, to: torch.dtype) -> None:
    plain, model = made(torch.float32)
    model.to(to)
    with uploads_of(model, 0):
        found = model(**INPUTS.inputs()).logits
    assert deviation(plain.to(to)(**INPUTS.inputs()).logits, found) < 5e-2


@torch.no_grad()
def test_what_the_user_chose_to_cross_in_stays(made: Way) -> None:
    plain, model = made(torch.bfloat16, wire_dtype="bfloat16")
    model.float()
    with uploads_of(model, 0):
        found = model(**INPUTS.inputs()).logits
    assert 1e-3 < deviation(plain.float()(**INPUTS.inputs()).logits, found) < 5e-2


def test_an_adapter_on_the_worker_moves_with_it(worker: LocalWorker) -> None:
    plain = with_lora(LLAMA.build(torch.bfloat16))
    with protected(copy_of(plain), worker, profile="paper") as model:
        model.float()
        expected = plain.float()(**INPUTS.inputs()).logits
        assert deviation(expected, model(**INPUTS.inputs()).logits) < BOUND[torch.float32]


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_made_inside_autocast_it_is_the_same_model(made: Way, lower: torch.dtype) -> None:
    """Transforms, images of secret vectors and whatever else is drawn there keep their precision."""
    with torch.autocast("cpu", lower):
        plain, model = made(torch.float32, verify=1.0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {layer.crossing.dtype for layer in model.protection.offloaded} == {torch.float32}
    expected_loss, expected = backward(with_lora(plain), INPUTS)
    loss, found = backward(with_lora(model), INPUTS)
    assert deviation(expected_loss, loss) < BOUND[torch.float32]
    assert largest_deviation(expected, found) < BOUND[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("what", ["renewed", "cast"])
def test_sent_again_inside_autocast(made: Way, what: str) -> None:
    plain, model = made(torch.bfloat16, verify=1.0)
    model.float()
    with torch.autocast("cpu", torch.float16):
        if what == "renewed":
            model.protection.rekey()
        else:
            model(**INPUTS.inputs())
    assert deviation(plain.float()(**INPUTS.inputs()).logits, model(**INPUTS.inputs()).logits) < BOUND[torch.float32]
