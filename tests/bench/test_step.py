"""`bench step` on a tiny shape: both contenders are real processes, one of them with a real worker."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Config

from obfuscatune.bench import step as step_module
from obfuscatune.bench.shapes import NAMES, config_of
from obfuscatune.bench.step import OWN_WAITING, StepBench, StepResult
from obfuscatune.wire.errors import ConfigError


@pytest.fixture(scope="module")
def tiny_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=64, n_positions=32).save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture(scope="module")
def measured(tiny_shape: Path) -> StepResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "PLAIN_WAITING", {"brief": OWN_WAITING})
        bench = StepBench(shape=str(tiny_shape), batch=2, length=16, threads=1, rounds=3, warmup=1)
        return bench.run(lambda line: None)


def test_both_sides_do_the_same_work(measured: StepResult) -> None:
    assert len(measured.plain) == len(measured.protected) == 3
    assert measured.difference < 1e-5
    assert measured.plain[0]["result"] != measured.plain[1]["result"]  # it learns: the steps are real


def test_a_step_crosses_once_per_group_and_direction(measured: StepResult) -> None:
    groups = 4  # c_attn, c_proj, c_fc, c_proj of the second block; the first stays in the enclave
    assert measured.protected[0]["crossings"] == 2 * groups


def test_the_breakdown_adds_up(measured: StepResult) -> None:
    assert set(measured.breakdown) >= {"rotate", "mix", "waiting for the worker", "model and optimizer"}
    assert sum(measured.breakdown.values()) == pytest.approx(measured.protected_seconds)
    assert min(measured.breakdown.values()) >= 0
    assert measured.ratio == sorted(measured.ratios)[1]


def test_the_document_is_json_and_names_what_its_times_depend_on(measured: StepResult) -> None:
    document = json.loads(json.dumps(measured.as_json()))
    assert document["environment"]["torch threads"] == "1"
    assert document["bench"]["profile"] == "private"
    assert document["peak_bytes"]["plain"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_named_shapes_have_configurations(name: str) -> None:
    assert config_of(name, layers=2).num_hidden_layers == 2


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="gpt2-xl"):
        config_of("gpt5")


@pytest.mark.parametrize("work", ["forward", "decode"])
def test_other_work_side_by_side(tiny_shape: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    monkeypatch.setattr(step_module, "PLAIN_WAITING", {"brief": OWN_WAITING})
    bench = StepBench(work=work, shape=str(tiny_shape), batch=2, length=8, threads=1, rounds=1, warmup=0)  # type: ignore[arg-type]
    measured = bench.run(lambda line: None)
    assert measured.difference < 1e-5
    assert measured.protected[0]["crossings"] == 4 * (16 if work == "decode" else 1)


def test_the_paper_s_adapter_is_trained_on_the_worker(tiny_shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "PLAIN_WAITING", {"brief": OWN_WAITING})
    bench = StepBench(shape=str(tiny_shape), batch=2, length=16, threads=1, rounds=2, warmup=0, profile="paper")
    measured = bench.run(lambda line: None)
    assert measured.protected[0]["result"] != measured.protected[1]["result"]
