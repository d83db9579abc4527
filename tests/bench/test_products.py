"""Products are counted whatever operation they come in; the machine's limits make a bound of them."""

import pytest
import torch
from torch.nn.functional import linear

from obfuscatune.bench.measures import Limits, ProductCounter, measure_limits

a, b = torch.ones(2, 3), torch.ones(3, 5)


@pytest.mark.parametrize(
    "product",
    [
        lambda: a @ b,
        lambda: torch.mm(a, b, out=torch.empty(2, 5)),
        lambda: torch.addmm(torch.ones(5), a, b),
        lambda: linear(a, b.t(), torch.ones(5)),
        lambda: torch.einsum("ik,kj->ij", a, b),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_one_product_counts_once(product, inference) -> None:
    with torch.inference_mode(inference), ProductCounter() as counter:
        product()
    assert counter.flops == 2 * 2 * 3 * 5
    assert counter.nbytes == 4 * (2 * 3 + 3 * 5 + 2 * 5)


def test_backward_counts_too() -> None:
    x, w = torch.ones(2, 3, requires_grad=True), torch.ones(3, 5, requires_grad=True)
    with ProductCounter() as counter:
        (x @ w).sum().backward()
    assert counter.flops == 3 * (2 * 2 * 3 * 5)


def test_a_bound_is_set_by_what_is_scarcer() -> None:
    limits = Limits(gflops=100, copied_gbytes=20, read_gbytes=10)
    assert limits.least_seconds(1e9) == pytest.approx(0.01)
    assert limits.least_seconds(1e9, 1e9) == pytest.approx(0.05)
    assert limits.passing_seconds(1e9) == pytest.approx(0.05)


def test_limits_are_measured() -> None:
    limits = measure_limits(side=64, large_bytes=1 << 16)
    assert min(limits.gflops, limits.copied_gbytes, limits.read_gbytes) > 0
