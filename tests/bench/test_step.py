"""`bench step` on a tiny shape: all sides are real processes, the protected ones with a real worker."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GPT2Config

from obfuscatune.advise.work import count_work
from obfuscatune.bench import step as step_module
from obfuscatune.bench.step import OWN_WAITING, StepBench
from obfuscatune.bench.step_result import LINK, WORKER, StepResult
from obfuscatune.bench.workload import NAMES, config_of, shape_name
from obfuscatune.enclave.profiles import resolve
from obfuscatune.errors import ConfigError


@pytest.fixture(scope="module")
def tiny_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=64, n_positions=32).save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture(scope="module")
def measured(tiny_shape: Path) -> StepResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "PLAIN_WAITING", {"brief": OWN_WAITING})
        bench = StepBench(
            shape=str(tiny_shape), batch=2, length=16, threads=1, rounds=3, warmup=1, profiles=("private", "paper")
        )
        return bench.run(lambda line: None)


@pytest.mark.long
def test_all_sides_do_the_same_work(measured: StepResult) -> None:
    assert list(measured.protected) == ["private", "paper"]
    assert measured.difference("private") < 1e-5
    for side in (measured.plain, *measured.protected.values()):
        assert len(side.rounds) == 3
        assert side.rounds[0]["result"] != side.rounds[1]["result"]  # it learns: the steps are real


@pytest.mark.long
def test_a_step_crosses_once_per_group_and_direction(measured: StepResult) -> None:
    groups = 4  # c_attn, c_proj, c_fc, c_proj of the second block; the first stays in the enclave
    assert measured.protected["private"].rounds[0]["crossings"] == 2 * groups


@pytest.mark.long
def test_the_breakdown_adds_up(measured: StepResult) -> None:
    for side in (measured.plain, *measured.protected.values()):
        assert sum(side.breakdown().values()) == pytest.approx(side.seconds)
        assert min(side.breakdown().values()) >= 0
        assert "products" in side.breakdown() and "optimizer" in side.breakdown()
    assert set(measured.protected["private"].breakdown()) >= {"rotate", "mix, and draw secrets", WORKER, LINK}
    assert WORKER not in measured.plain.breakdown()
    assert measured.ratio("private") == sorted(measured.ratios("private"))[1]


@pytest.mark.long
def test_products_are_counted_where_they_are_computed(measured: StepResult) -> None:
    private = measured.protected["private"]
    rows, block = 2 * 16, 32 * (96 + 32 + 128 + 128)
    crossing = rows + 8  # and the shield rows
    assert private.products["worker_flops"] == 2 * 2 * block * crossing  # forward and backward
    assert private.median("worker_seconds") > 0
    assert measured.protected["paper"].products["worker_flops"] > 2 * 2 * block * rows  # LoRA's products among them
    assert 0 < measured.plain.least_seconds(measured.limits) < private.least_seconds(measured.limits)


@pytest.mark.long
def test_the_documents_name_what_their_times_depend_on(measured: StepResult) -> None:
    document = json.loads(json.dumps(measured.as_json()))
    assert document["environment"]["torch threads"] == "1"
    assert document["bench"]["profiles"] == ["private", "paper"]
    assert document["limits"]["gflops"] > 0
    assert document["plain"]["peak_bytes"].keys() == {"own"}
    assert min(document["protected"]["private"]["peak_bytes"].values()) > 0
    assert "| `paper` |" in measured.as_markdown()
    picture = measured.picture().svg(alone=True)
    assert picture.startswith("<svg xmlns") and "rotate" in picture and "least possible" in picture


@pytest.mark.parametrize("name", NAMES)
def test_named_shapes_have_configurations(name: str) -> None:
    assert config_of(name, layers=2).num_hidden_layers == 2


def test_the_way_with_the_fastest_step_is_plains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a slow minute of the machine fell on it."""
    runs = {"active": [[9.0, 5.0, 4.0, 4.5], [9.0, 2.0, 3.0, 2.5]], "passive": [[1.0, 2.4, 2.4, 2.4]] * 2}
    told: list[str] = []

    @contextmanager
    def start(kind: str, waiting: dict[str, str]) -> Iterator[Any]:
        steps = runs[waiting["OMP_WAIT_POLICY"].lower()]
        seconds = iter(steps[told.count(waiting["OMP_WAIT_POLICY"])])
        told.append(waiting["OMP_WAIT_POLICY"])
        yield SimpleNamespace(tell=lambda word: {"seconds": next(seconds)})

    monkeypatch.setattr(step_module, "PLAIN_WAITING", {n: {"OMP_WAIT_POLICY": n.upper()} for n in runs})
    bench = StepBench()
    object.__setattr__(bench, "_start", start)
    lines: list[str] = []
    assert bench._best_plain_waiting(lines.append) == "active"
    assert told == ["ACTIVE", "PASSIVE", "ACTIVE", "PASSIVE"]
    assert len(lines) == 4


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="gpt2-xl"):
        config_of("gpt5")


@pytest.mark.long
@pytest.mark.parametrize("work", ["forward", "decode"])
def test_other_work_side_by_side(tiny_shape: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    monkeypatch.setattr(step_module, "PLAIN_WAITING", {"brief": OWN_WAITING})
    bench = StepBench(work=work, shape=str(tiny_shape), batch=2, length=8, threads=1, rounds=1, warmup=0)  # type: ignore[arg-type]
    measured = bench.run(lambda line: None)
    assert measured.difference("private") < 1e-5
    passes = [2] * 16 if work == "decode" else [2 * 8]  # rows of each; the prompts were read before
    private, block = measured.protected["private"], 32 * (96 + 32 + 128 + 128)
    assert private.rounds[0]["crossings"] == 4 * len(passes)
    assert private.products["worker_flops"] == 2 * block * sum(rows + 8 for rows in passes)  # also by the kernel


@pytest.mark.parametrize(
    ("shape", "name"),
    [("llama-3.2-1b", "llama-3.2-1b"), ("/models/tiny/config.json", "tiny"), ("/models/v1.5", "v1.5")],
)
def test_results_carry_names_and_no_paths(shape: str, name: str) -> None:
    assert shape_name(shape) == name


@pytest.mark.long
def test_the_cost_model_counts_the_products_that_are_computed(tiny_shape: Path, measured: StepResult) -> None:
    work = count_work("step", config_of(str(tiny_shape)), 2, 16, resolve("private"))
    private = measured.protected["private"]
    assert work.plain_flops == measured.plain.products["flops"]
    assert work.worker_flops == private.products["worker_flops"]
    assert work.crossings == private.median("crossings")
    assert work.crossing_bytes == pytest.approx(private.median("bytes"), rel=0.1)  # and headers, of small messages
