"""Sides that differ are seen to differ, each in its own check."""

from dataclasses import replace

import pytest

from obfuscatune.demo.result import check, compare_runs
from obfuscatune.demo.settings import LAST_LOSS_TOLERANCE, LOSS_TOLERANCE, WEIGHT_TOLERANCE, Settings
from obfuscatune.errors import ModelFileError
from tests.demo.made import adapter, metric, side, step

FULL = Settings(seed=0, quick=False)


@pytest.fixture
def sides(tmp_path):
    return side("protected", tmp_path), side("plain", tmp_path)


def failed(protected, plain, settings=FULL):
    return [it.name for it in check(settings, protected, plain, compare_runs(protected, plain)) if not it.passed]


def test_equal_sides_pass(sides):
    assert failed(*sides) == []
    differences = compare_runs(*sides)
    assert (differences.loss, differences.weight, differences.largest_weight) == (0.0, 0.0, 2.0)


def test_one_step_of_another_loss_fails(sides):
    protected, plain = sides
    apart = replace(protected, steps=(step(1, 7.0 + 2 * LOSS_TOLERANCE), step(2, 1.0)))
    assert failed(apart, plain) == ["largest loss difference"]


def test_another_loss_at_the_end_fails_sooner(sides):
    protected, plain = sides
    apart = replace(protected, steps=(step(1, 7.0), step(2, 1.0 + 2 * LAST_LOSS_TOLERANCE)))
    assert failed(apart, plain) == ["last loss difference"]


def test_one_other_weight_fails(sides, tmp_path):
    protected, plain = sides
    apart = replace(protected, adapter=adapter(tmp_path / "other", a=[0.5, -2.0 + 2 * WEIGHT_TOLERANCE]))
    assert failed(apart, plain) == ["largest adapter weight difference"]


def test_another_answer_fails_unless_it_is_a_tie(sides):
    protected, plain = sides
    answers = ["y"] + ["x"] * 9
    apart = replace(protected, after=metric(9, answers))
    assert failed(apart, plain) == ["questions answered differently, ties aside"]
    tied = replace(protected, after=metric(9, answers, margin=1e-6))
    assert failed(tied, plain) == []


def test_too_few_right_answers_fail_on_each_side(sides):
    protected, plain = (replace(side, after=metric(7)) for side in sides)
    assert failed(protected, plain) == ["accuracy after, protected", "accuracy after, plain"]
    assert failed(protected, plain, Settings(seed=0, quick=True)) == []


def test_a_nan_passes_nothing(sides):
    protected, plain = sides
    apart = replace(protected, steps=(step(1, float("nan")), step(2, 1.0)))
    assert failed(apart, plain) == ["largest loss difference"]


def test_nan_in_a_later_step_passes_nothing(sides):
    protected, plain = sides
    apart = replace(protected, steps=(step(1, 7.0), step(2, float("nan"))))
    assert failed(apart, plain) == ["last loss difference", "largest loss difference"]


def test_nan_weights_pass_nothing(sides, tmp_path):
    protected, plain = sides
    apart = replace(protected, adapter=adapter(tmp_path / "other", a=[0.5, float("nan")]))
    assert failed(apart, plain) == ["largest adapter weight difference"]


def test_adapters_of_other_layers_are_refused(sides, tmp_path):
    protected, plain = sides
    with pytest.raises(ModelFileError, match="not adapters of the same layers"):
        compare_runs(replace(protected, adapter=adapter(tmp_path / "other", b=[0.5, -2.0])), plain)
