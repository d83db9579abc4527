"""`obfuscatune advise`: this machine and a real worker, measured; and what is made of that."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from obfuscatune.advise.advice import Advice, Changes, Gpu, WorkerAdvice
from obfuscatune.advise.cost import OWN, Prediction, Team
from obfuscatune.advise.enclave import Machine, ProductTimes, free_memory_bytes
from obfuscatune.advise.link import Link, RequestTimes, _check
from obfuscatune.advise.work import Request, Work
from obfuscatune.bench.measures import Product
from obfuscatune.cli.app import run
from obfuscatune.errors import WrongProduct


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shape")
    GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=64, n_positions=64).save_pretrained(folder)
    return str(folder)


@pytest.mark.long
def test_a_machine_and_a_worker_are_measured_and_the_parts_add_up(
    shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["advise", shape, "--work", "decode", "--batch", "4", "--threads", "1", "--profile", "guarded"]
    assert run([*asked, "--gpu-tflops", "400", "--gpu-gbytes", "3000", "--json"]) == 0
    said, shown = capsys.readouterr()
    found = json.loads(said)
    assert "measuring: worker this machine" in shown
    (worker,) = found["workers"]
    assert worker["address"] == "this machine"
    assert sum(worker["parts"].values()) == pytest.approx(worker["seconds"])
    assert worker["ratio"] == pytest.approx(worker["seconds"] / found["plain_seconds"])
    assert all(worker["parts"][name] > 0 for name in ("rotate, mix, verify", "worker's products", "latency"))
    assert worker["parts"]["waiting for masks"] > 0
    assert 0 < worker["link"]["latency_seconds"] < 1
    assert found["work"]["requests"] == 4 and found["work"]["tokens"] == 4
    assert set(found["machine"]["gflops"]) >= {"float32", "float64"}
    assert found["confidential_gpu"]["least_seconds"] > 0
    assert found["fits"] and found["verdicts"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--profile", "paper"], "LoRA in the enclave"),
        (["--profile", "enclave"], "no worker"),
        (["--work", "train"], "--work: expected step, forward, decode"),
        (["--worker-gflops", "0"], "--worker-gflops: expected a number above 0"),
        (["--latency-us", "-1"], "--latency-us: expected"),
        (["--link-gbytes", "nan"], "--link-gbytes: expected"),
        (["--gpu-tflops", "400"], "go together"),
        (["--mask-worker", "unix:/x"], "--mask-worker is for --profile guarded"),
        (["--profile", "guarded", "--worker", "unix:/x"], "takes two workers"),
        (["--fleet", "none.yaml", "--worker", "unix:/x"], "leave out --worker"),
        (["--fleet", "none.yaml", "--peer", "x.pem"], "leave out --peer"),
        (["--fleet", "none.yaml"], "none.yaml"),
        (["--shape", "gpt5"], "unknown shape"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker was started, or asked")

    monkeypatch.setattr("obfuscatune.advise.advice.measure_machine", none)
    if "paper" in options:
        monkeypatch.setattr("obfuscatune.cli.advise._opened", lambda *_: ({}, None))
    assert run(["advise", *options]) == 2
    assert said in capsys.readouterr().err


def an_advice(*worker_seconds: float, free: int = 1 << 40, gpu: Gpu | None = None) -> Advice:
    work = Work(
        "step", Counter({Product(8, 100, 100): 10}), Counter(), 1, 1.0, 1, Counter({Request(8, 100, 100, 16): 10}), 8,
        10**9, 10**8, torch.float32, torch.float32,
    )  # fmt: skip
    rest = {"waiting for masks": 0.0, "latency": 0.0, "bytes up": 0.0, "bytes down": 0.0}
    workers = []
    for number, seconds in enumerate(worker_seconds):
        parts = dict.fromkeys(OWN, 0.25) | {"worker's products": seconds} | rest
        speeds = Link(1e-4, 1e-9, 1e-9), RequestTimes(1e-4, 1e-9, 1e-10)
        workers.append(WorkerAdvice(f"w{number or ''}", *speeds, Prediction(10.0, parts)))
    machine = Machine(2, ("AMX",), {"float32": 100.0}, 10.0, 10.0, 1 << 40, free)
    what = {"model": "m", "batch": 1, "length": 8, "profile": "private", "dtype": "float32", "threads": 1}
    return Advice(what, work, machine, 10.0, {"float32": 10.0, "bfloat16": 4.0}, workers, gpu, Changes(50.0), {})


def test_a_worker_pays_only_against_the_best_that_the_enclave_can_do_alone() -> None:
    fast = " ".join(an_advice(1.0).verdicts())
    assert "at w pays: 2 s against 4 s with everything in the enclave in bfloat16" in fast
    slow = " ".join(an_advice(5.0).verdicts())
    assert "at w does not pay: 6 s against 4 s with everything in the enclave in bfloat16" in slow
    assert "largest part of it is worker's products (83%)" in slow
    assert "feeds 5 such workers at most, with 6 streams at a time" in slow
    assert "That pays: 1 s against 4 s" in slow
    small = " ".join(an_advice(5.0, free=10**9).verdicts())
    assert "do not fit" in small and "is what makes it possible" in small


def test_several_workers_are_reckoned_with_together() -> None:
    several = an_advice(8.0, 4.0, 8.0)
    said = " ".join(several.verdicts())
    assert "these 3 workers together, columns shared out, pays: 3 s against 4 s" in said
    assert "feeds 7 workers, these and others like them, at most" in said
    shown = several.as_markdown()
    assert "| 3, these | 3 | 2 | 4.0 | the workers |" in shown
    assert "| 1 | 5 | 4 | 2.0 | the workers |" in shown  # the fastest
    assert several.as_json()["fed_workers"] == 7
    assert Team.of(several.predictions, 4).streamed_seconds == pytest.approx(1 / (0.5 + 3 / 20))


def test_an_answer_fits_on_a_screen() -> None:
    text = an_advice(8.0, 4.0, 8.0, gpu=Gpu(400, 2000)).as_markdown()
    assert len(text.splitlines()) <= 50
    assert text.splitlines()[2].startswith("- ")  # what follows comes first


def test_tables_name_what_was_given_and_what_was_not_measured() -> None:
    text = an_advice(1.0, gpu=Gpu(400, 2000)).as_markdown()
    assert "worker-gflops 50 is given" in text
    assert "could not take less than 0.002 s" in text and "nothing of it was measured" in text
    assert "| 16 | 1.06 | 1 | 8.0 | the enclave |" in text
    assert "| 1, these | 2 | 1 | 8.0 | the enclave |" in text


def test_a_product_is_timed_once_and_large_ones_on_some_of_their_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    times = ProductTimes(torch.float32)
    made: list[int] = []
    real = torch.full
    monkeypatch.setattr(torch, "full", lambda size, *a, **k: made.append(size[0] * size[1]) or real(size, *a, **k))
    first = times.of(Product(4, 4096, 1 << 20, transposed=True))
    assert first > 0 and max(made) <= 64 << 18
    count = len(made)
    assert times.of_all(Counter({Product(4, 4096, 1 << 20, transposed=True): 3})) == pytest.approx(3 * first)
    assert len(made) == count


def test_free_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    said = tmp_path / "meminfo"
    said.write_text("MemTotal:  9000 kB\nMemAvailable:   1000 kB\n")
    assert free_memory_bytes(said) == 1000 * 1024
    assert free_memory_bytes(tmp_path / "none") > 1000 * 1024


def test_a_worker_that_answers_wrongly_is_not_measured() -> None:
    product = torch.randn(3, 5, dtype=torch.float64)
    _check(product + 1e-6, product, torch.float32)
    wrong = product.clone()
    wrong[1, 2] += 0.1
    with pytest.raises(WrongProduct, match="random matrix"):
        _check(wrong, product, torch.float32)
    with pytest.raises(WrongProduct):
        _check(product * float("nan"), product, torch.float32)
