"""The account of what masks can have shown."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.enclave.accountant import DEFAULT_BUDGET, SLACK, Accountant, advantage
from obfuscatune.enclave.masks import DEVIATION
from obfuscatune.errors import BudgetExceeded, ConfigError


def phi(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


@given(st.floats(0, 20))
def test_the_advantage_is_that_of_two_normal_distributions_mu_apart(mu: float) -> None:
    assert advantage(mu) == pytest.approx(2 * phi(mu / 2) - 1, abs=1e-12)


def test_a_billion_rows_of_4096_elements_pass_the_default_budget() -> None:
    accountant = Accountant(DEVIATION)
    for _ in range(1000):
        accountant.spend("layer", 10**6, 4096)
    spent = accountant.spent
    assert spent.rows == 10**9
    assert spent.advantage == pytest.approx(0.006, abs=5e-4)
    assert spent.advantage < DEFAULT_BUDGET


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 5000), st.integers(1, 20000)), max_size=20))
def test_squares_add_up_and_each_layer_has_its_own(requests: list[tuple[str, int, int]]) -> None:
    accountant = Accountant(DEVIATION, 0.5)
    for layer, rows, width in requests:
        accountant.spend(layer, rows, width)
    spent = accountant.spent
    assert spent.mu**2 == pytest.approx(sum(SLACK * 4 * rows * width for _, rows, width in requests) / DEVIATION**2)
    assert sum(mu**2 for mu in spent.by_layer.values()) == pytest.approx(spent.mu**2)
    assert spent.rows == sum(rows for _, rows, _ in requests)


def test_what_would_pass_the_budget_is_refused_and_not_counted() -> None:
    accountant = Accountant(1.0, advantage(2.0))  # a request of one row and one element: mu² = 4.04
    with pytest.raises(BudgetExceeded, match="mask budget; 0 rows were sent"):
        accountant.spend("layer", 1, 1)
    assert accountant.spent.mu == 0
    accountant = Accountant(1.0, advantage(2.02))
    accountant.spend("layer", 1, 1)
    with pytest.raises(BudgetExceeded):
        accountant.spend("layer", 1, 1)


def test_an_earlier_part_of_the_run_counts() -> None:
    accountant = Accountant(1.0, advantage(2.5))
    accountant.carry(1, 2.0)
    with pytest.raises(BudgetExceeded):
        accountant.spend("layer", 1, 1)
    assert accountant.spent.rows == 1


def test_all_is_written_down_before_it_is_spent_and_seldom() -> None:
    """Whenever the process is killed, what was kept covers what was sent, by a thousandth of the budget or less."""
    accountant, kept = Accountant(DEVIATION), [(0, 0.0)]
    accountant.keep_by(lambda rows, mu: kept.append((rows, mu)))
    whole = 0.0250667**2  # mu² of an advantage of 0.01
    for _ in range(400):
        before = accountant.spent.mu
        accountant.spend("layer", 1000, 4096)
        spent = accountant.spent.mu
        assert spent <= kept[-1][1] * (1 + 1e-12)
        assert kept[-1][1] ** 2 <= before**2 + whole / 990
    assert 1 < len(kept) < 20

    def full(rows: int, mu: float) -> None:
        raise OSError("the disk is full")

    accountant.keep_by(full)
    with pytest.raises(OSError, match="full"):
        accountant.spend("layer", 1000, 4096)
    assert accountant.spent.mu == spent


@pytest.mark.parametrize(("rows", "mu"), [(-1, 0.1), (1, -0.1), (1, math.nan), (1, math.inf)])
def test_what_cannot_have_been_spent_is_not_carried(rows: int, mu: float) -> None:
    """NaN would compare with no budget."""
    with pytest.raises(ValueError, match="a mu of"):
        Accountant(DEVIATION).carry(rows, mu)


def test_threads_lose_nothing() -> None:
    accountant = Accountant(DEVIATION)

    def spend() -> None:
        for _ in range(500):
            accountant.spend("layer", 2, 8)

    threads = [threading.Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert accountant.spent.rows == 4000


@pytest.mark.parametrize("budget", [0.0, 1.0, -1.0, math.nan])
def test_what_is_no_budget(budget: float) -> None:
    with pytest.raises(ConfigError, match="an advantage above 0 and below 1"):
        Accountant(DEVIATION, budget)
