"""Tables, charts and files from cells made by hand."""

import csv
import io
from pathlib import Path

import pytest

from obfuscatune.reproduction.cells import Measured
from obfuscatune.reproduction.compared import check, pairings
from obfuscatune.reproduction.documents import to_csv, to_html, to_markdown
from obfuscatune.reproduction.presets import PRESETS
from obfuscatune.reproduction.request import Request
from tests.report.documents import check_self_contained
from tests.reproduction import made

REQUEST = Request(Path("out"), PRESETS["smoke"], ("accuracy",), ("sciq",), None, None)
KAPPAS = ("paper", "conditioned(8)", "gaussian")


def slowdown(profile: str, ratio: float) -> Measured:
    settings = {"shape": "gpt2", "layers": None, "batch": 2, "length": 8, "threads": 2, "profile": profile}
    ratios = [ratio - 0.1, ratio, ratio + 0.1]
    result = {"plain_seconds": 1.0, "protected_seconds": ratio, "ratio": ratio, "ratios": ratios, "bytes": 5e6}
    return Measured("slowdown", f"gpt2 {profile}", settings, result, 1.0, {"torch": "2"})


def obfuscation() -> Measured:
    settings = {"shape": "gpt2", "layers": 2, "profile": "paper", "protection": {"transform": "haar"}}
    result = {"seconds": 12.34, "enclave_peak_bytes": 1e9, "worker_peak_bytes": 2e9, "bytes_uploaded": 5e8}
    return Measured("obfuscate", "gpt2 paper", settings, result, 1.0, {"torch": "2"})


@pytest.fixture
def cells():
    tuned = [made.accuracy(m, right, seed=s) for s in (0, 1) for m, right in (("plain", 5 + s), ("paper", 6 + s))]
    errors = [made.error(name, [1e-7 * 10**i, 2e-7 * 10**i]) for i, name in enumerate(KAPPAS)]
    return [*tuned, *errors, slowdown("paper", 1.5), slowdown("private", 2.0), obfuscation()]


def test_the_numbers_stand_in_the_markdown(cells):
    text = to_markdown(REQUEST, cells, check(cells))
    assert "| sciq | paper | 55.00 ± 7.07 | 65.00 ± 7.07 | +10.00 |" in text
    assert "| sciq | paper | 2.0000 ± 0.0000 | 2.0000 ± 0.0000 | +0.000 % | +0.000 % | 2 (0) of 20 |" in text
    assert "| conditioned(8) | 8 | float32 | 1.0e-06 | 2.0e-06 |" in text
    assert "| gpt2 | all | private | 1.0 s | 2.0 s | 2.00x | 1.90 to 2.10 | 5.00 MB |" in text
    assert "| gpt2 | 2 | paper | haar | 12.3 s | 1.00 GB | 2.00 GB | 500 MB |" in text
    assert "smoke, scaled down from the paper's recipe" in text


def test_the_page_is_whole_and_shows_every_chart(cells):
    page = to_html(REQUEST, cells, check(cells))
    document = check_self_contained(page)
    assert document.tags.count("svg") == 4
    for text in ("1. Accuracy", "2a. Error", "4. Slowdown", "What must hold", "DOES NOT HOLD"):
        assert text in document.text
    for text in ("test questions right, %", "the paper's range", "condition number", "gpt2, float32"):
        assert text in document.text, "in a picture"


def test_csv_has_a_line_for_each_number(cells):
    files = to_csv(cells)
    assert set(files) == {"accuracy.csv", "error.csv", "slowdown.csv", "obfuscate.csv"}
    rows = list(csv.DictReader(io.StringIO(files["accuracy.csv"])))
    found = {(row["method"], row["seed"], row["quantity"]): float(row["value"]) for row in rows}
    assert found["paper", "1", "test.acc.value"] == 0.7
    assert not any("verdicts" in row["quantity"] for row in rows)


def test_pairs_are_of_the_same_seed_and_unpaired_seeds_are_left_out():
    cells = [made.accuracy("plain", 5, seed=1), made.accuracy("paper", 9, seed=0), made.accuracy("paper", 6, seed=1)]
    (pairing,) = pairings(cells)
    assert pairing.difference("test") == pytest.approx(10.0)
    assert [len(comparison.differing) for comparison in pairing.answers] == [1]


def outcome(cells, words):
    (found,) = [it for it in check(cells) if words in it.claim]
    return found.held


@pytest.mark.parametrize(("right", "held"), [((5, 6), True), ((6, 6), False)])
def test_accuracy_holds_within_half_a_point(right, held):
    cells = [made.accuracy("plain", 5 + s, seed=s) for s in (0, 1)]
    cells += [made.accuracy("paper", right[s], seed=s) for s in (0, 1)]
    assert outcome(cells, "accuracy within") is held


@pytest.mark.parametrize(("right", "held"), [(6, True), (4, True), (7, False)])
def test_of_one_seed_the_questions_standard_error_is_the_measure(right, held):
    assert outcome([made.accuracy("plain", 5), made.accuracy("paper", right)], "one standard error") is held


@pytest.mark.parametrize(("right", "held"), [(6, True), (5, False), (4, False)])
def test_tuning_must_help(right, held):
    assert outcome([made.untuned("plain", 5), made.accuracy("plain", right)], "after tuning") is held


def test_before_and_after_stand_side_by_side():
    text = to_markdown(REQUEST, [made.untuned("plain", 5), made.accuracy("plain", 7)], [])
    assert "| sciq | plain | 50.00 ± 10.00 | 70.00 | +20.00 | 50.00 | 70.00 | +20.00 |" in text


@pytest.mark.parametrize(("loss", "held"), [(2.019, True), (2.021, False), (1.979, False)])
def test_loss_holds_within_a_hundredth(loss, held):
    assert outcome([made.accuracy("plain", 5), made.accuracy("paper", 5, loss=loss)], "final loss") is held


@pytest.mark.parametrize(("right", "margin", "held"), [(5, 1.0, True), (6, 1.0, False), (6, 1e-4, True)])
def test_private_answers_as_plain_does_ties_aside(right, margin, held):
    cells = [made.accuracy("plain", 5), made.accuracy("private", right, margin=margin)]
    assert outcome(cells, "every question") is held


@pytest.mark.parametrize(("errors", "held"), [((1, 2, 3), True), ((1, 3, 2), False)])
def test_error_must_grow_with_the_condition_number(errors, held):
    cells = [made.error(name, [1.0, error]) for name, error in zip(KAPPAS, errors, strict=True)]
    assert outcome(cells, "error grows") is held
