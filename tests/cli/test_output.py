"""What users see."""

import json
import math

import pytest

from obfuscatune.cli import output


@pytest.mark.parametrize(
    ("values", "width", "curve"),
    [
        ([], 30, ""),
        ([5.0], 30, "▁"),
        ([1.0, 1.0, 1.0], 30, "▁▁▁"),
        ([8, 7, 6, 5, 4, 3, 2, 1], 30, "█▇▆▅▄▃▂▁"),
        ([4, 4, 1, 1], 2, "█▁"),
        ([3, 3, 3, 2, 2, 2, 1, 1, 1], 3, "█▅▁"),
    ],
)
def test_sparkline(values, width, curve):
    assert output.sparkline(values, width) == curve


def test_a_sparkline_has_at_most_its_width():
    for count in range(1, 100):
        assert len(output.sparkline([float(n) for n in range(count)], 30)) == min(count, 30)


def test_json_is_one_document_without_nan(capsys):
    output.write_json({"a": [1.5, math.nan], "b": (math.inf, "é")})
    text = capsys.readouterr().out
    assert json.loads(text) == {"a": [1.5, None], "b": [None, "é"]}
    assert "é" in text


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with output.progress("working") as meter:
        meter.expect(3)
        meter.advance(1)
        now = 2.0
        meter.advance(1, "loss 2.5")
        now = 6.9
        meter.advance(1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "working: 2/3 loss 2.5\n"


def test_a_stage_is_named_at_once(capsys):
    with output.progress("working") as meter:
        meter.begin("reading")
        meter.advance(1)
        assert capsys.readouterr().err == "working: reading\n"


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with output.progress("working") as meter:
        meter.expect(2)
        meter.advance(2, "all [of] it")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "working" in captured.err
    assert "2/2" in captured.err
    assert "all [of] it" in captured.err


def test_nothing_but_results_goes_to_stdout(capsys):
    output.warn_plain()
    output.notice("[brackets] are no markup")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nothing is protected" in captured.err
    assert "[brackets] are no markup" in captured.err
