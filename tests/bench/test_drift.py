"""`bench drift`: a worker that changes every product, in few steps of the embedded model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from obfuscatune.bench.drift import (
    FLOAT32,
    FLOAT64,
    DriftBench,
    DriftResult,
    DriftRow,
    Goal,
    _model,
    _Secrets,
    _Task,
    _with_lora,
    ways,
)
from obfuscatune.bench.drift_worker import Aim, DriftingComputer, Push, known_tolerance
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.target_layers import find_groups
from obfuscatune.enclave.transforms import TransformSpec
from obfuscatune.enclave.verification import Verifier
from obfuscatune.errors import ConfigError

P, Q = 64, 96


@pytest.fixture(scope="module")
def result() -> DriftResult:
    """Two steps under a profile that finds changes, and one that does not."""
    bench = DriftBench(
        steps=2, profiles=("private:verify=1", "private:verify=0"), sizes=(1e4,), held_out=4, goals=("token",)
    )
    return bench.run(lambda _: None)


def rows_of(result: DriftResult, side: str, way: str = "") -> list[DriftRow]:
    return [row for row in result.rows if row.side == side and row.way == way]


@pytest.mark.long
def test_a_change_above_the_tolerance_is_caught_at_once(result: DriftResult) -> None:
    for way in ways("private"):
        (row,) = rows_of(result, "private:verify=1", way)
        assert (row.goal, row.caught, row.products) == ("token", 1, 1)
        assert math.isnan(row.loss)


@pytest.mark.long
def test_one_that_is_not_caught_reaches_what_it_aims_at(result: DriftResult) -> None:
    """It follows the rows, so that mixing does not give it signs of its own."""
    (token,), (offset,) = (rows_of(result, "private:verify=0", way) for way in ("weights", "offset"))
    (honest,) = rows_of(result, "private:verify=0")
    assert token.caught is offset.caught is None
    assert token.served > 0.1
    assert token.adapter > 10 * honest.adapter
    assert abs(offset.served) < 0.3 * offset.largest_served, (
        "a change that does not follow rows comes with random signs"
    )


@pytest.mark.long
def test_honest_runs_are_those_of_float32(result: DriftResult) -> None:
    (exact,), (plain,) = rows_of(result, FLOAT64), rows_of(result, FLOAT32)
    assert exact.adapter == 0 < plain.adapter < 1e-3
    for profile in ("private:verify=1", "private:verify=0"):
        (honest,) = rows_of(result, profile)
        assert honest.loss == pytest.approx(exact.loss, abs=1e-4)
        assert honest.size == 0 and honest.products > 0


@pytest.mark.long
def test_the_report_says_all(result: DriftResult) -> None:
    text, document = result.as_markdown(), json.loads(json.dumps(result.as_json()))
    assert "| private:verify=1 | token | weights | 10000 | 1 | 1 |" in text
    assert len(document["runs"]) == len(result.rows)
    assert document["runs"][0]["served"] is None


def test_what_is_to_be_planted_is_pushed_the_other_way_forward() -> None:
    task, model, secrets = _Task.read(DriftBench(held_out=1)), _model(torch.float32), _Secrets()
    groups = find_groups(model, 3)
    for group in groups:
        R_in, R_out = (TransformSpec("haar").make(dim, SecretStream.fresh()) for dim in group.shape)
        secrets.keyed(group.name, R_in, R_out)
    tuned = _with_lora(model)

    def aims(goal: Goal) -> list[Aim]:
        computer = DriftingComputer(size=1.0)
        task._aim(computer, goal, groups, secrets, tuned)
        return computer.aims

    for one, other in zip(aims("token"), aims("plant"), strict=True):
        assert torch.equal(one.forward.into, -other.forward.into)
        assert torch.equal(one.backward.into, other.backward.into)
        assert float(one.forward.into.norm()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sizes": (0.5, 0.0)}, "--size 0: a share"),
        ({"sizes": (math.nan,)}, "--size nan"),
        ({"profiles": ("enclave",)}, "sends nothing"),
        ({"profiles": ("paper",)}, "adapter on the worker"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DriftBench(**settings).check()  # type: ignore[arg-type]


@pytest.fixture
def matrix() -> Tensor:
    return SecretStream.fresh().normal(P, Q, dtype=torch.float32) / 8


def drifting(matrix: Tensor, way: str, size: float) -> DriftingComputer:
    """A worker that pushes products of that matrix along their first element, as rows lie along theirs."""
    push = [
        Push(torch.eye(n, dtype=torch.float64)[0], torch.eye(k, dtype=torch.float64)[0], 1.0)
        for n, k in ((P, Q), (Q, P))
    ]
    computer = DriftingComputer(way, size)  # type: ignore[arg-type]
    computer.aims = [Aim(matrix[0], *push)]
    return computer


@pytest.mark.parametrize("way", ["offset", "weights"])
@pytest.mark.parametrize("transpose", [False, True])
def test_no_row_is_moved_by_more_than_it_should(matrix: Tensor, way: str, transpose: bool) -> None:
    x = SecretStream.fresh().normal(40, Q if transpose else P, dtype=torch.float32)
    product, changed = (torch.empty(40, P if transpose else Q) for _ in range(2))
    DriftingComputer().multiply(x, matrix, product, transpose=transpose)
    drifting(matrix, way, 1e3).multiply(x, matrix, changed, transpose=transpose)
    tau = known_tolerance(x, float(matrix.norm()), product, 1.0, masked=False)
    moved = (changed - product).norm(dim=1).double() / tau
    assert float(moved.max()) == pytest.approx(1e3, rel=0.2)
    assert float((changed - product)[:, 1:].abs().max()) == 0
    if way == "weights":
        assert torch.allclose((changed - product)[:, 0] / x[:, 0], (changed - product)[0, 0] / x[0, 0], rtol=0.05)


def test_it_knows_the_tolerance(matrix: Tensor) -> None:
    x = SecretStream.fresh().normal(40, P, dtype=torch.float32)
    scale = float(x.square().mean().sqrt())
    exact = Verifier(matrix, SecretStream.fresh(), 1.0).probe(transpose=False).tolerance(x @ matrix, scale, x.dtype)
    assert torch.allclose(known_tolerance(x, float(matrix.norm()), x @ matrix, 1.0, masked=False), exact, rtol=1e-5)


def test_another_matrix_is_left_alone(matrix: Tensor) -> None:
    x, other = SecretStream.fresh().normal(4, P, dtype=torch.float32), matrix.flip(0).contiguous()
    out = torch.empty(4, Q)
    drifting(matrix, "offset", 1e3).multiply(x, other, out, transpose=False)
    assert torch.allclose(out, x @ other, atol=1e-4), "a push would move an element by 1e-2"
