"""`bench seal`: real processes on a small file, and the shares that it reports."""

import json
from pathlib import Path

import pytest

from obfuscatune.bench.sealing import BESIDE, SealBench, SealResult, Took
from obfuscatune.bench.sealing_process import WORKS


def test_every_piece_of_work_is_timed_and_nothing_is_left(tmp_path: Path) -> None:
    lines: list[str] = []
    measured = SealBench(5 << 20, 1, tmp_path).run(lines.append)
    assert set(measured.took) == set(WORKS)
    assert len(lines) == len(WORKS)
    assert all(it.seconds > 0 and it.peak_bytes > 10_000_000 for it in measured.took.values())
    assert list(tmp_path.iterdir()) == []
    assert json.loads(json.dumps(measured.as_json()))["bench"]["size"] == 5 << 20


def test_shares_are_of_speeds() -> None:
    took = {work: Took(1.0, 1.0, 1) for work in WORKS} | {"seal": Took(4.0, 8.0, 1)}
    result = SealResult({"size": 10**9, "rounds": 1, "threads": 2}, took, {})
    assert result.share("seal", BESIDE["seal"][0]) == 0.25
    assert "| seal | 0.25 | 8.00 | 1 B | 0.25 | 0.25 |" in " ".join(result.as_markdown().split("  ")).replace("  ", " ")


@pytest.mark.long
def test_half_of_the_speed_of_aes_gcm_alone_and_little_memory() -> None:
    measured = SealBench().run(lambda _: None)
    for work in "seal", "open":
        assert measured.share(work, BESIDE[work][0]) >= 0.5
        assert measured.took[work].peak_bytes < 300_000_000
