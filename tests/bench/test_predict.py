"""The cost model: work counted from a shape is the work that is done, and a result predicts itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.bench.measures import OTHER
from obfuscatune.bench.predict import Processor, Speeds, Work, calibrate, check, count_work, predict
from obfuscatune.bench.step_result import LINK, WORKER
from obfuscatune.cli.app import run
from obfuscatune.enclave.profiles import resolve
from obfuscatune.errors import ConfigError

WORK = Work(10e9, 2e9, 4e9, 6.6e9, 88, 0.5e9)
SPEEDS = Speeds(Processor(100, 10), Processor(80, 8), 110, 2, 1e-4)


def test_seconds_are_work_over_speed() -> None:
    found = predict(WORK, SPEEDS)
    assert found.plain_seconds == pytest.approx(10 / 100 + 2 / 10)
    assert found.protected_seconds == pytest.approx(4 / 80 + 2 / 8 + 6.6 / 110 + 0.5 / 2 + 88e-4)
    assert found.ratio == pytest.approx(found.protected_seconds / found.plain_seconds)
    slow = predict(WORK, SPEEDS.with_changes(None, 0.5, None))
    assert slow.protected_seconds == pytest.approx(found.protected_seconds + 1)


def a_result(profile: str = "private", **bench: Any) -> dict[str, Any]:
    """As `bench step` writes it, at GPT-2 small's shape with two layers, at round speeds."""
    settings = {"work": "step", "shape": "gpt2", "layers": 2, "batch": 1, "length": 64, "threads": 2} | bench
    work = count_work("step", "gpt2", settings["layers"], 1, 64, resolve(profile))
    plain = {"products": work.plain_flops / 100e9, OTHER: work.other_bytes / 10e9}
    protected = {
        "products": work.enclave_flops / 80e9,
        OTHER: work.other_bytes / 8e9,
        "rotate": work.crossing_bytes / 4e9,
        "copy": work.crossing_bytes / 4e9,
        WORKER: work.worker_flops / 110e9,
        LINK: work.crossings * 1e-4,
    }
    seconds = sum(protected.values())
    return {
        "bench": settings,
        "plain": {"seconds": sum(plain.values()), "breakdown_seconds": plain},
        "protected": {
            profile: {
                "seconds": seconds,
                "ratio": seconds / sum(plain.values()),
                "breakdown_seconds": protected,
                "worker_seconds": protected[WORKER],
            }
        },
        "environment": {"processor": "P", "cores": "2", "system": "Linux x86_64"},
    }


def test_a_result_gives_the_speeds_that_it_was_made_at() -> None:
    work = count_work("step", "gpt2", 2, 1, 64, resolve("private"))
    found = calibrate(a_result(), "private", work)
    assert (found.plain.gflops, found.plain.gbytes) == pytest.approx((100, 10))
    assert (found.enclave.gflops, found.enclave.gbytes) == pytest.approx((80, 8))
    assert (found.worker_gflops, found.crossing_gbytes, found.latency_seconds) == pytest.approx((110, 2, 1e-4))
    with pytest.raises(ConfigError, match="no profile 'guarded', but private"):
        calibrate(a_result(), "guarded", work)


def test_what_was_measured_stands_beside_what_was_predicted() -> None:
    deeper = a_result(layers=3)
    deeper["protected"]["private"]["ratio"] *= 1.1
    results = [("a", a_result()), ("b", deeper), ("c", a_result(work="decode"))]
    errors = {row.file: row.error for row in check(results, SPEEDS)}
    assert errors == pytest.approx({"a": 0, "b": 1 / 1.1 - 1})


@pytest.mark.parametrize(("profile", "rows"), [("private", 72)])
def test_work_is_counted_from_the_shape(profile: str, rows: int) -> None:
    one, two = (count_work("step", "gpt2", layers, 1, 64, resolve(profile)) for layers in (2, 3))
    block = 768 * (2304 + 768 + 3072 + 3072)
    assert two.crossings - one.crossings == 8  # four groups, forward and backward
    assert two.plain_flops - two.enclave_flops == 2 * (one.plain_flops - one.enclave_flops) == 2 * 4 * 64 * block
    assert one.worker_flops >= 4 * rows * block
    assert one.crossing_bytes >= 4 * 2 * rows * 768 * (1 + 3 + 1 + 1 + 1 + 4 + 4 + 1)
    assert one.other_bytes > 0
    forward = count_work("forward", "gpt2", 2, 1, 64, resolve(profile))
    assert forward.crossings == 4
    assert replace(forward, other_bytes=0) != replace(one, other_bytes=0)


def test_the_published_scheme_is_not_covered() -> None:
    with pytest.raises(ConfigError, match="LoRA in the enclave"):
        count_work("step", "gpt2", 2, 1, 64, resolve("paper"))
    with pytest.raises(ConfigError, match="step and forward"):
        count_work("decode", "gpt2", 2, 1, 64, resolve("private"))


def test_the_command_predicts_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "2026-01-01-step-gpt2-private.json"
    path.write_text(json.dumps(a_result()))
    shown = ["bench", "predict", "--from", str(path), "--shape", "gpt2", "--layers", "2", "--batch", "1"]
    assert run([*shown, "--length", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ratio"] == pytest.approx(a_result()["protected"]["private"]["ratio"])
    assert run(["bench", "predict", "--from", str(path), "--against", str(tmp_path)]) == 0
    assert "| step, gpt2, 2 layers, 1 x 64 | `private` |" in capsys.readouterr().out
