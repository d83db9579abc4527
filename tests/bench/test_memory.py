"""`bench memory`: two real processes, and lines that are fitted to what they hold."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Config

from obfuscatune.bench.memory import ALLOWED_BYTES, MemoryBench, MemoryResult, MemoryRun


@pytest.mark.long
def test_every_step_is_sampled_in_both_processes(tmp_path: Path) -> None:
    GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=64, n_positions=32).save_pretrained(tmp_path)
    bench = MemoryBench(shape=str(tmp_path / "config.json"), length=16, threads=1, steps=4, warmup=2)
    measured = bench.run(lambda line: None)
    (run,) = measured.runs
    assert len(run.samples) == 4
    assert min(*run.held("enclave"), *run.held("worker")) > 50_000_000  # each has loaded torch
    document = json.loads(json.dumps(measured.as_json()))
    assert document["bench"]["shape"] == tmp_path.name
    assert len(document["runs"]["private"]["held_bytes"]["worker"]) == 4
    assert "| `private` | worker |" in measured.as_markdown()
    assert "private, enclave" in measured.picture().svg(alone=True)


@pytest.mark.parametrize(("a_step", "grows"), [(0, False), (4000, False), (12000, True)])
@pytest.mark.parametrize("process", [0, 1])
def test_what_rises_is_told_from_what_goes_up_and_down(a_step: int, grows: bool, process: int) -> None:
    samples = []
    for number in range(1000):
        held = [100_000_000 + (number % 7) * 500_000 + min(number, 500) * 100_000] * 2  # it comes to rest half-way
        held[process] += number * a_step
        samples.append((held[0], held[1]))
    run = MemoryRun("private", samples)
    assert run.slope(("enclave", "worker")[process]) == pytest.approx(a_step, abs=200)
    assert run.grows is grows
    result = MemoryResult({"steps": 1000, "warmup": 0, "shape": "x", "batch": 1, "length": 1, "threads": 1}, [run], {})
    assert result.grows is grows
    assert len(result.as_json()["runs"]["private"]["held_bytes"]["enclave"]) == 200
    assert ("| grows |" in result.as_markdown()) is grows


@pytest.mark.long
@pytest.mark.parametrize("profile", ["private", "guarded", "paper"])
def test_a_thousand_steps_leave_nothing_behind(profile: str) -> None:
    measured = MemoryBench(threads=2, steps=1000, profiles=(profile,)).run(lambda line: None)
    for process in ("enclave", "worker"):
        assert measured.runs[0].growth(process) < ALLOWED_BYTES
