"""What is told of rounds that are given: no process is started."""

from typing import Any

import pytest

from obfuscatune.bench.measures import OTHER, SEND, WAIT, Limits
from obfuscatune.bench.step_result import LINK, WORKER, Side, StepResult

BENCH = {"work": "step", "shape": "gpt2", "layers": None, "batch": 2, "length": 256, "threads": 2, "rounds": 3}
BENCH |= {"link": {"kind": "tcp", "delay_ms": 1.0, "gbit": None}}


def rounds(*seconds: float, **others: Any) -> list[dict[str, Any]]:
    return [{"seconds": it, "result": 1.0, "peak_bytes": 1, **others} for it in seconds]


def test_sending_and_waiting_are_the_workers_as_far_as_it_computed() -> None:
    spans = {"products": 0.3, SEND: 0.1, WAIT: 9.0}
    side = Side(rounds(1.0, waiting_seconds=0.6, worker_seconds=0.65), spans, {"flops": 0, "bytes": 0})
    assert side.breakdown() == pytest.approx({"products": 0.3, WORKER: 0.65, LINK: 0.05})
    side = Side(rounds(1.0, waiting_seconds=0.6, worker_seconds=2.0), spans, {"flops": 0, "bytes": 0})
    assert side.breakdown() == pytest.approx({"products": 0.3, WORKER: 0.7, LINK: 0.0})


def test_least_possible_is_what_must_be_computed_and_what_must_pass_through_memory() -> None:
    limits = Limits(gflops=100, copied_gbytes=10, read_gbytes=5)
    counted = {"flops": 1_000_000_000, "bytes": 0, "worker_flops": 2_000_000_000, "worker_bytes": 0}
    side = Side(rounds(1.0, bytes=50_000_000), {OTHER: 1.0}, counted)
    assert side.least_seconds(limits) == pytest.approx(3 / 100 + 2 * 0.05 / 10)


@pytest.mark.parametrize(("slowest", "told"), [(1.4, False), (1.6, True)])
def test_a_disturbed_run_says_so(slowest: float, told: bool) -> None:
    counted = {"flops": 1, "bytes": 1}
    plain = Side(rounds(1.0, 1.0, 1.0), {OTHER: 1.0}, counted)
    protected = Side(rounds(1.0, slowest, 1.1, crossings=1, bytes=1), {OTHER: 1.0}, counted)
    result = StepResult(BENCH, "brief", plain, {"private": protected}, Limits(1, 1, 1), {})
    assert result.ratio("private") == pytest.approx(1.1)
    assert result.mean_ratio("private") == pytest.approx((2.1 + slowest) / 3)
    assert "link: tcp, 1 ms;" in result.as_markdown()
    assert ("Not an idle machine" in result.as_markdown()) is told
