"""One result, shown in each way: the numbers are the same, and a failure is never shown as a success."""

import json

import pytest

from obfuscatune.cli.app import run
from obfuscatune.demo.page import render
from obfuscatune.demo.result import document
from obfuscatune.demo.terminal import print_result
from tests.demo.made import result, side
from tests.report.documents import check_self_contained


@pytest.fixture
def good(tmp_path):
    return result(side("protected", tmp_path), side("plain", tmp_path))


@pytest.fixture
def bad(tmp_path):
    """Five of ten right on the protected side."""
    return result(side("protected", tmp_path, right=5), side("plain", tmp_path))


def test_the_document_is_json(good):
    found = json.loads(json.dumps(document(good)))
    assert found["passed"] is True
    assert found["model"]["enclave_share"] == 0.264
    assert found["protected"]["link"]["crossings"] == 62 and found["plain"]["link"] is None
    assert found["recipe"]["lora_r"] == 16


def test_the_page_shows_success(good):
    page = check_self_contained(render(good))
    assert "the result is the same" in page.text
    assert "26.4 %" in page.text and "3.00 MB" in page.text
    assert "0 <b>?" in page.text, "questions are text, not markup"


def test_the_page_shows_failure(bad):
    page = check_self_contained(render(bad))
    assert "accuracy after, protected: 0.5, the limit is 0.8" in page.text
    assert "the result is the same" not in page.text


def test_the_terminal_shows_success(good, tmp_path, capsys):
    print_result(good, tmp_path)
    shown = capsys.readouterr().out
    assert "both runs agree" in shown and "FAILED" not in shown
    assert "62 (31 a step)" in shown and "10/10 the same" in shown
    assert str(tmp_path / "report.html") in shown


def test_the_terminal_shows_failure(bad, tmp_path, capsys):
    print_result(bad, tmp_path)
    shown = capsys.readouterr().out
    assert "FAILED  accuracy after, protected: 0.5, the limit is 0.8" in shown
    assert "both runs agree" not in shown


@pytest.mark.parametrize(("which", "code"), [("good", 0), ("bad", 1)])
def test_the_exit_code_says_which(which, code, tmp_path, capsys, request, monkeypatch):
    made = request.getfixturevalue(which)
    monkeypatch.setattr("obfuscatune.demo.run.run_demo", lambda *_: made)
    out = tmp_path / "out"
    assert run(["demo", "--json", "--out", str(out)]) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "result.json").read_text())
    assert printed["passed"] is (code == 0)
    assert (out / "report.html").exists()


def test_a_seed_below_zero_is_refused_before_anything_is_replaced(tmp_path, capsys):
    assert run(["demo", "--seed", "-1", "--out", str(tmp_path / "out")]) == 2
    assert "--seed: expected 0 or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
