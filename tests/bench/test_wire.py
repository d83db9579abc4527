"""`bench wire` with a real worker behind each kind of link."""

import json

import pytest

from obfuscatune.bench import wire
from obfuscatune.bench.wire import WireBench, WireResult, WireRow


def test_each_link_carries_every_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_MOST_SECONDS", 0)
    said: list[str] = []
    links = ("shared memory", "tls")
    measured = WireBench(links=links, rows=(1, 64), width=32, threads=1).run(said.append)
    assert [(row.link, row.rows) for row in measured.rows] == [(link, rows) for link in links for rows in (1, 64)]
    assert all(row.seconds > 0 < row.computing_seconds for row in measured.rows)
    assert all(row.slow_seconds >= row.seconds for row in measured.rows)
    assert all(row.bare_seconds > 0 and row.ratio == row.seconds / row.bare_seconds for row in measured.rows)
    assert measured.rows[1].nbytes == 2 * 4 * 64 * 32
    assert json.loads(json.dumps(measured.as_json()))["fitted"].keys() == set(links)
    assert "| 64 | 16.4 kB |" in measured.as_markdown()
    assert "shared memory" in measured.picture().svg(alone=True)
    assert len(said) == 4


def test_a_line_is_fitted_to_small_and_to_large_messages() -> None:
    bench = WireBench(links=("tcp",))
    sizes = [8 * 256 * rows for rows in bench.rows]
    points = [WireRow("tcp", n // 2048, n, 5e-5 + n / 2e9, 0, 0, 1e-5) for n in sizes]
    fitted = WireResult(bench, points, {}).fitted("tcp")
    assert fitted.latency_seconds == pytest.approx(5e-5)
    assert fitted.gbytes == pytest.approx(2)
    assert fitted.seconds(4e9) == pytest.approx(2 + 5e-5)


def test_where_few_bytes_make_no_difference_no_bandwidth_is_told() -> None:
    """With few rows alone the line through them is flat, or falls."""
    for slope in (0.0, -1e-12, 1e-15):
        points = [WireRow("tcp", rows, 2048 * rows, 3e-5 + slope * 2048 * rows, 0, 0, 1e-5) for rows in (1, 4, 16)]
        result = WireResult(WireBench(links=("tcp",), rows=(1, 4, 16)), points, {})
        assert result.fitted("tcp").gbytes is None
        assert result.fitted("tcp").seconds(2048) == pytest.approx(3e-5, rel=0.01)
        assert "| tcp | 30 |  | 3.00 |" in result.as_markdown()
        assert "tcp" in result.picture().svg()
