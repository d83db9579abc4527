"""A public base under `guarded`: the workers serve the published weights, and nothing is uploaded.

Through whole worker processes that read the files themselves, against the plain model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from obfuscatune import load, local_worker, protect
from obfuscatune.assets import tiny_model_path
from obfuscatune.enclave.client import ClientStats
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ConfigError, WrongProduct
from obfuscatune.protocol.messages import MessageType
from obfuscatune.protocol.payloads import Offer
from obfuscatune.protocol.transcript import read_transcript
from obfuscatune.worker.served import ServedWeights
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import backward, batch, deviation, greedy, largest_deviation, with_lora
from tests.worker.serving import Serving, serving

ONE_PASS = 1e-5
"""Relative, of logits; as in test_guarded.py."""
GRADIENTS = 6e-5
"""Likewise."""


@dataclass(frozen=True)
class Published:
    """A model's directory, and two workers that serve it and record what they see."""

    directory: Path
    workers: tuple[LocalWorker, LocalWorker]
    records: tuple[Path, Path]

    def load(self, **settings: Any) -> Any:
        """The model under `guarded`, with a public base."""
        compute, mask = (worker.address for worker in self.workers)
        return load(self.directory, compute, "guarded", mask_worker=mask, public_base=True, first_blocks=0, **settings)


def published(name: str, folder: Path) -> Path:
    """A directory with a model of that name: the embedded GPT-2, or a tiny Llama in bfloat16 in two shards."""
    if name == "gpt2":
        return shutil.copytree(tiny_model_path(), folder / "model")
    model = ARCHITECTURES["llama"].build(torch.bfloat16)
    model.save_pretrained(folder / "model", max_shard_size="60KB")
    assert len(list((folder / "model").glob("*.safetensors"))) > 1
    return folder / "model"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp(request.param)
    directory = published(request.param, folder)
    records = folder / "compute", folder / "mask"
    with ExitStack() as stack:
        extra = ("--serve-model", str(directory))
        started = [stack.enter_context(local_worker(threads=1, record=record, extra=extra)) for record in records]
        yield Published(directory, (started[0], started[1]), records)


def parties(model: Any) -> tuple[ClientStats, ClientStats]:
    return model.protection.stats, model.protection.masks.client.stats


def named(records: tuple[Path, Path]) -> int:
    """How many OFFERs have named weights so far."""
    entries = (entry for record in records for entry in read_transcript(record, allow_cut=True))
    return sum(entry.header.type is MessageType.OFFER and len(entry.body) > Offer.size(0) for entry in entries)


def plain(directory: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@pytest.mark.usefixtures("float64_throughout")
def test_it_is_exact_and_nothing_is_uploaded(served: Published) -> None:
    """Logits, gradients and greedy decoding of a float64 model; both workers served all matrices."""
    model, expected = served.load(dtype=torch.float64), plain(served.directory, torch.float64)
    with model:
        inputs = batch((13, 4), expected.config.vocab_size)
        with torch.no_grad():
            logits = model(**inputs.inputs()).logits
            assert deviation(inputs.attended(expected(**inputs.inputs()).logits), inputs.attended(logits)) < ONE_PASS
        prompt = batch((6,), expected.config.vocab_size)
        assert torch.equal(greedy(model, prompt, tokens=8), greedy(expected, prompt, tokens=8))
        lora = {"fan_in_fan_out": True} if model.config.model_type == "gpt2" else {}
        _, reference = backward(with_lora(expected, **lora), inputs)
        _, found = backward(with_lora(model, **lora), inputs)
        assert largest_deviation(reference, found) < GRADIENTS
        for stats in parties(model):
            assert (stats.uploads, stats.bytes_uploaded) == (0, 0)
            assert stats.served == len(model.protection.offloaded) > 4
        count = len(model.protection.offloaded)
        assert model.protection.serving == (
            "matrices served by the workers themselves: "
            f"compute worker {count} of {count}, mask worker {count} of {count}"
        )
    for record in served.records:
        seen = {entry.header.type for entry in read_transcript(record, allow_cut=True)}
        assert MessageType.OFFER in seen
        assert MessageType.MULTIPLY in seen
        assert MessageType.STORE not in seen


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
@torch.no_grad()
def test_other_dtypes(served: Published, dtype: Any) -> None:
    """bfloat16 and float16 files are asked for in float32: as near to float64 as plain in the model's dtype is."""
    with served.load(dtype=dtype) as model:
        exact, unprotected = (plain(served.directory, it) for it in (torch.float64, model.dtype))
        inputs = batch((13, 4), exact.config.vocab_size)
        expected = inputs.attended(exact(**inputs.inputs()).logits).to(model.dtype)
        allowed = 4 * deviation(expected, inputs.attended(unprotected(**inputs.inputs()).logits))
        assert deviation(expected, inputs.attended(model(**inputs.inputs()).logits)) < allowed
        assert all(stats.uploads == 0 and stats.served for stats in parties(model))


def test_a_model_in_memory_is_served_too(served: Published) -> None:
    model = plain(served.directory, torch.float32)
    expected = plain(served.directory, torch.float32)
    addresses = [worker.address for worker in served.workers]
    with protect(model, addresses[0], "guarded", mask_worker=addresses[1], public_base=True), torch.no_grad():
        assert all(stats.uploads == 0 and stats.served for stats in parties(model))
        inputs = batch((5,), model.config.vocab_size)
        assert deviation(expected(**inputs.inputs()).logits, model(**inputs.inputs()).logits) < 2e-5


@torch.no_grad()
def test_a_worker_that_starts_again_serves_again(served: Published) -> None:
    with served.load(dtype=torch.float32) as model:
        inputs = batch((5,), model.config.vocab_size)
        before = model(**inputs.inputs()).logits
        for worker in served.workers:
            worker.restart()
        assert deviation(before, model(**inputs.inputs()).logits) < 2e-5
        for stats in parties(model):
            assert (stats.uploads, stats.reconnects) == (0, 1)
            assert stats.served == 2 * len(model.protection.offloaded)


@torch.no_grad()
def test_a_worker_without_it_is_sent_it(served: Published, worker: LocalWorker) -> None:
    """And the mask worker, which has it, is not."""
    address = served.workers[1].address
    with load(served.directory, worker.address, "guarded", mask_worker=address, public_base=True) as model:
        compute, mask = parties(model)
        assert (compute.served, mask.uploads) == (0, 0)
        assert compute.uploads == mask.served == len(model.protection.offloaded)


def test_secret_matrices_are_not_named(served: Published) -> None:
    """Rotated, or said to be closed: whatever the worker has, it is sent W_star, and no digest of W."""
    compute, mask = (worker.address for worker in served.workers)
    before = named(served.records)
    with load(served.directory, compute, "guarded", mask_worker=mask) as model:
        assert all(stats.served == 0 for stats in parties(model))
    with served.load(transform="structured") as model:
        assert all(stats.served == 0 and stats.uploads for stats in parties(model))
    assert named(served.records) == before
    with served.load() as model:
        assert named(served.records) == before + 2 * len(model.protection.offloaded)
    with pytest.raises(ConfigError, match="base='closed' says that the weights are not published"):
        served.load(base="closed")


@pytest.fixture
def two_models(tmp_path: Path) -> tuple[Path, Path]:
    """Two models of the same shapes."""
    folders = tmp_path / "asked", tmp_path / "other"
    for folder in folders:
        model = ARCHITECTURES["llama"].build(torch.bfloat16)
        if folder.name == "other":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.25)
        model.save_pretrained(folder)
    return folders


def loaded(asked: Path, worker: Serving, mask_worker: LocalWorker) -> Any:
    return load(asked, str(worker.address), "guarded", mask_worker=mask_worker.address, public_base=True)


def test_another_model_of_the_same_shapes_is_told_apart(
    tmp_path: Path, two_models: tuple[Path, Path], mask_worker: LocalWorker
) -> None:
    asked, other = two_models
    with serving(tmp_path, models=[other]) as worker, loaded(asked, worker, mask_worker) as model:
        assert model.protection.stats.served == 0
        assert model.protection.stats.uploads == len(model.protection.offloaded)
    with serving(tmp_path, models=[other, asked]) as worker, loaded(asked, worker, mask_worker) as model:
        assert model.protection.stats.uploads == 0


def test_a_worker_that_says_falsely_that_it_has_them_is_caught(
    tmp_path: Path, two_models: tuple[Path, Path], mask_worker: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It multiplies by another model's matrices."""
    asked, other = two_models

    def find(self: ServedWeights, digests: Any, shape: tuple[int, int], dtype: torch.dtype, adopt: Any) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(ServedWeights, "find", find)
    with serving(tmp_path, models=[other]) as worker, loaded(asked, worker, mask_worker) as model:
        assert model.protection.stats.uploads == 0
        with pytest.raises(WrongProduct, match="the compute worker's product is wrong"):
            model(**batch((5,), model.config.vocab_size).inputs())
