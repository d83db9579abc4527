"""Two results side by side."""

import pytest

from obfuscatune.evaluation.scoring import TIE, Metric, Verdict, compare


def metric(*verdicts: tuple[int, float], name: str = "acc") -> Metric:
    return Metric(name, tuple(Verdict(answer, True, margin) for answer, margin in verdicts))


def test_differences_and_ties_are_told_apart():
    one = metric((0, 1.0), (1, 1.0), (2, TIE / 2), (3, 1.0), (0, TIE / 2))
    other = metric((0, 1.0), (2, 1.0), (1, 1.0), (2, TIE / 2), (0, 1.0))
    found = compare(one, other)
    assert (found.metric, found.differing, found.ties) == ("acc", (1, 2, 3), (2, 3))
    assert not found.same_but_for_ties


def test_a_lead_of_exactly_the_bound_is_no_tie():
    found = compare(metric((0, TIE)), metric((1, TIE)))
    assert found.differing == (0,)
    assert found.ties == ()


def test_the_same_answers_are_the_same():
    one = metric((0, 0.0), (1, 5.0))
    assert compare(one, one).differing == ()
    assert compare(one, one).same_but_for_ties


def test_other_questions_are_not_compared():
    with pytest.raises(ValueError, match="acc of 1 against acc of 2"):
        compare(metric((0, 1.0)), metric((0, 1.0), (0, 1.0)))
    with pytest.raises(ValueError, match="acc of 1 against acc_norm of 1"):
        compare(metric((0, 1.0)), metric((0, 1.0), name="acc_norm"))
