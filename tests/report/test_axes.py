"""Axes hold their values and are marked at round numbers."""

import math

import pytest

from obfuscatune.report.axes import linear_axis, log_axis


def labels(axis):
    return [label for _, label in axis.ticks]


def test_linear_ticks_are_round():
    assert labels(linear_axis([0.18, 6.95])) == ["0", "2", "4", "6", "8"]
    assert labels(linear_axis([0.11, 0.19])) == ["0.10", "0.12", "0.14", "0.16", "0.18", "0.20"]
    assert labels(linear_axis([0, 45_000], wanted=4)) == ["0", "20,000", "40,000", "60,000"]


def test_a_tight_axis_ends_at_its_values():
    axis = linear_axis([1, 120], wanted=6, whole=True, tight=True)
    assert (axis.low, axis.high) == (1, 120)
    assert labels(axis) == ["20", "40", "60", "80", "100", "120"]


def test_whole_axes_have_no_ticks_between():
    assert labels(linear_axis([1, 3], wanted=8, whole=True, tight=True)) == ["1", "2", "3"]


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [], [math.nan], [-1e-9, 1e9]])
def test_degenerate_values_still_give_an_axis(values):
    axis = linear_axis(values)
    assert axis.low < axis.high
    assert all(-1e-6 <= axis.place(value) <= 1 + 1e-6 for value in values if math.isfinite(value))


def test_log_ticks_are_powers_of_ten():
    axis = log_axis([0.0, 2e-8, 5e-6])
    assert labels(axis) == ["1e-8", "1e-7", "1e-6", "1e-5"]
    assert axis.place(1e-8) == 0 and axis.place(1e-5) == pytest.approx(1)
    assert axis.place(1e-6) == pytest.approx(2 / 3)


@pytest.mark.parametrize("values", [[], [0.0], [1e-6], [1e-300, 1e300]])
def test_degenerate_values_still_give_a_log_axis(values):
    axis = log_axis(values)
    assert 0 < axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 9
