"""The kernels of one request of few rows and of its check, for each instruction set, beside what they replace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from obfuscatune import RootKey, native
from obfuscatune.enclave.kernels import REFERENCE, Kernels, Native, Tolerance
from obfuscatune.enclave.mixing import SIZE_OF_ROWS, RowScales

if not native.are_there():
    pytest.skip("no native kernels here; torch computes", allow_module_level=True)

KEY = RootKey(b"r" * 32)
DTYPES = (torch.float32, torch.float64)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
TOLERANCE = Tolerance(unit=1e-6, expected=2.0, of_masks=1e-7, largest=1e3)


def some(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return KEY.stream("x", *shape).normal(*shape).to(dtype)


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that this processor has."""
    if native.kernels_of(request.param, 4) is None:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def kernels_of(isa: str, dtype: torch.dtype) -> Native:
    table = native.kernels_of(isa, dtype.itemsize)
    assert table is not None
    return Native(table)


@pytest.mark.parametrize("k", [2, 4])
def test_contract_directions(isa: str, k: int) -> None:
    """The same vectors from the same bytes, orthonormal: nothing of the words is left out, or used twice."""
    words = KEY.stream("directions", k).random_bytes(64 * k)
    found, expected = kernels_of(isa, torch.float64).directions(words, k), REFERENCE.directions(words, k)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(found.T @ found, torch.eye(k).double(), rtol=0, atol=1e-14)
    for byte in range(7, 64 * k, 8):  # the most significant of each word
        changed = bytearray(words)
        changed[byte] ^= 0x40
        assert not torch.allclose(kernels_of(isa, torch.float64).directions(bytes(changed), k), found, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "q"), [(1, 5), (9, 768), (72, 97)])
def test_contract_excess(isa: str, m: int, q: int, dtype: torch.dtype) -> None:
    R, product, c = some(q, 8), some(m, q, dtype=dtype), REFERENCE.directions(bytes(range(128)), 2)
    U = product.double() @ R
    by = kernels_of(isa, dtype)
    for row, change in ((None, 0.0), (0, 1e-3), (m - 1, 1.0), (m // 2, 1e9)):
        changed = product.clone()
        if row is not None:
            changed[row, q - 1] += change
        found, expected = by.excess(changed, R, U, c, TOLERANCE), REFERENCE.excess(changed, R, U, c, TOLERANCE)
        assert found[1] and expected[1]
        if row is None:
            assert found[0] < 1
        else:
            assert found[0] == pytest.approx(expected[0], rel=0.05)  # torch's sums of float32 err by some 1e-5
            assert found[0] > 1


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_exceeds_any_tolerance(isa: str, dtype: torch.dtype, by_torch: bool) -> None:
    by: Kernels = REFERENCE if by_torch else kernels_of(isa, dtype)
    R, c = some(70, 8), REFERENCE.directions(bytes(range(128)), 2)
    for column in range(70):
        product = some(9, 70, dtype=dtype)
        U = product.double() @ R
        product[column % 9, column] = NOT_FINITE[column % 3]
        assert by.excess(product, R, U, c, TOLERANCE) == (math.inf, False)
    product = some(9, 70, dtype=dtype)
    for bad in NOT_FINITE:  # of the enclave's own numbers: no product passes
        for where in range(2):
            images, directions = product.double() @ R, c.clone()
            (images if where else directions)[3, 1] = bad
            assert by.excess(product, R, images, directions, TOLERANCE)[0] == math.inf
        assert by.excess(product, R, product.double() @ R, c, TOLERANCE._replace(expected=bad))[0] == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 9, 32])
def test_the_orthogonal_factor_is_that_of_the_same_numbers(isa: str, m: int, dtype: torch.dtype) -> None:
    """Of numbers that are dependent it is orthogonal still."""
    width, by = 96, kernels_of(isa, dtype)
    turn, x, out = by.of_few_unrotated(width), some(1, width, dtype=dtype), torch.empty(m, width, dtype=dtype)
    for kind in ("normal", "of rank 1", "nothing"):
        normal = some(m * m + (m - 1) * width, dtype=dtype)
        square = normal[: m * m].view(m, m)
        if kind != "normal":
            square.copy_(square[:1].clone().expand(m, m) * (kind == "of rank 1"))
        mixing = by.mixing_of_few(1, m, width, normal, SIZE_OF_ROWS)
        assert turn.send(x, mixing, out)
        Q, atol = mixing.A.double(), 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(Q @ Q.T, torch.eye(m).double(), rtol=0, atol=atol)
        if kind == "normal":
            factor, upper = np.linalg.qr(square.double().numpy())
            expected = torch.from_numpy(factor * np.sign(upper.diagonal()))
            torch.testing.assert_close(Q, expected, rtol=0, atol=32 * atol)
            shield = normal[m * m :].view(m - 1, width) * SIZE_OF_ROWS
            assert torch.equal(mixing.stack[1:], shield)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_size_are_scaled_as_many_are(isa: str, dtype: torch.dtype) -> None:
    """Powers of two to the last bit, at the ends of what the dtype holds too; a row of zeros stays one."""
    width, by = 97, kernels_of(isa, dtype)
    largest = torch.finfo(dtype).max
    unit = some(1, width, dtype=dtype) / 8
    sizes = [0.0, 1.1, 2.0**-20, largest**0.5 * 8, largest**-0.5 / 8, torch.finfo(dtype).tiny / 64]
    for size in sizes:
        for x in (unit * size, torch.full((1, width), 0.9 * size, dtype=dtype)):
            scales, out = RowScales.of(x), torch.empty(9, width, dtype=dtype)
            mixing = by.mixing_of_few(1, 9, width, some(81 + 8 * width, dtype=dtype), SIZE_OF_ROWS)
            assert by.of_few_unrotated(width).send(x, mixing, out)
            assert mixing.job.up[0] == scales.up.item(), size
            assert mixing.job.mean_square == pytest.approx(scales.mean_square, rel=1e-5)
            assert torch.equal(mixing.stack[:1], scales.scaled(x))
    for size in (1.0, 0.5, 2.0**40, largest):  # where a rounded size may be above or below a power of two
        assert by.of_few_unrotated(width).send(torch.full((1, width), size, dtype=dtype), mixing, out)
        found = size / mixing.job.up[0]
        assert found == pytest.approx(mixing.job.mean_square**0.5)
        assert found == 1 or size == largest
    for column in range(width):
        x, kept = unit.clone(), out.clone()
        x[0, column] = NOT_FINITE[column % 3]
        assert not by.of_few_unrotated(width).send(x, mixing, out)
        assert torch.equal(out, kept)
