"""What products are checked by, from one pass over W: as exact as torch's three passes, at any shape."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from obfuscatune import RootKey, native
from obfuscatune.enclave import kernels
from obfuscatune.enclave.kernels import REFERENCE, Kernels, Native
from obfuscatune.enclave.verification import Verifier
from obfuscatune.errors import WrongProduct

KEY = RootKey(b"i" * 32)
CHUNK = 128  # rows that the kernel sums one after another
SHAPES = [(1, 1), (3, 5), (1, 64), (2, 65), (7, 300), (CHUNK, 128), (CHUNK + 1, 97), (2 * CHUNK + 3, 515), (64, 4100)]


def some(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return KEY.stream("some", *shape).normal(*shape).to(dtype)


def kernels_by(name: str, dtype: torch.dtype) -> Kernels:
    """Torch's, or those for an instruction set that this processor has."""
    if name == "torch":
        return REFERENCE
    table = native.kernels_of(name, dtype.itemsize) if native.are_there() else None
    if table is None:
        pytest.skip(f"no {name} here")
    return Native(table)


@pytest.mark.parametrize("by", ["torch", *native.ISAS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_they_are_the_products(p: int, q: int, dtype: torch.dtype, by: str) -> None:
    W, R, L = some(p, q), some(q, 8), some(p, 8)
    W_R, Wt_L, norm = kernels_by(by, dtype).sketch(W.to(dtype), R.to(dtype), L.to(dtype))
    wide = [m.to(dtype).double() for m in (W, R, L)]
    within = 32 * torch.finfo(dtype).eps
    scale = float(wide[0].norm())
    torch.testing.assert_close(W_R.double(), wide[0] @ wide[1], rtol=0, atol=within * scale)
    torch.testing.assert_close(Wt_L.double(), wide[0].T @ wide[2], rtol=0, atol=within * scale)
    assert norm == pytest.approx(scale, rel=within)


@pytest.mark.parametrize("by", ["torch", *native.ISAS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(value: float, by: str) -> None:
    W = some(100, 130)
    W[99, 129] = value
    W_R, Wt_L, norm = kernels_by(by, W.dtype).sketch(W, some(130, 8), some(100, 8))
    assert not W_R[99].isfinite().any()
    assert W_R[:99].isfinite().all()
    assert not Wt_L[129].isfinite().any()
    assert not torch.tensor(norm).isfinite()


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_check_by_either_takes_the_product_and_nothing_else(
    by_kernel: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_kernel:
        monkeypatch.setattr(kernels, "kernels_for", lambda x: REFERENCE)
    W = some(CHUNK + 3, 259, dtype=dtype)
    verifier = Verifier(W, KEY.stream("verifier"), 1.0)
    for transpose, matrix in ((False, W), (True, W.T)):
        x = some(40, matrix.shape[0], dtype=dtype)
        probe = verifier.probe(transpose=transpose)
        U, product = x.double() @ probe.V, x @ matrix
        probe.check(product, U, 1.0, dtype)
        product[39, -1] *= 1.1
        with pytest.raises(WrongProduct):
            probe.check(product, U, 1.0, dtype)


@pytest.mark.parametrize("by", ["torch", *native.ISAS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_rows_and_their_squares_are_projected_in_float64(n: int, p: int, dtype: torch.dtype, by: str) -> None:
    """The kernel errs as sums in float64 do; torch's, in float32, as sums of 256 elements."""
    x, v = some(n, 2 * p, dtype=dtype)[:, :p], some(p, 8)  # rows with a gap between them
    images, squares = kernels_by(by, dtype).project(x, v)
    within = 32 * torch.finfo(dtype if by == "torch" else torch.float64).eps
    scale = float(x.double().norm() * v.norm())
    torch.testing.assert_close(images, x.double() @ v, rtol=0, atol=within * scale)
    torch.testing.assert_close(squares, x.double().square().sum(1), rtol=1e-12, atol=0)
    assert images.dtype == squares.dtype == torch.float64


def test_squares_of_rows_that_are_not_finite_are_not() -> None:
    x = some(9, 33, dtype=torch.float32)
    x[8, 32], x[3, 0] = torch.nan, torch.inf
    assert kernels.project(x, some(33, 8)).squares.isfinite().tolist() == [row not in (3, 8) for row in range(9)]


@pytest.mark.parametrize("by", ["torch", *native.ISAS])
def test_sums_of_masks_err_little_whatever_their_length(by: str) -> None:
    """Against 64-bit significands. Summed one after another 4,100 products of doubles err by 20 units of rounding."""
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("this platform's long double is a double")
    x, v = some(64, 4100), some(4100, 8)
    exact = x.numpy().astype(np.longdouble) @ v.numpy().astype(np.longdouble)
    errors = (kernels_by(by, torch.float64).project(x, v).images.numpy() - exact).astype(np.float64)
    sizes = x.norm(dim=1, keepdim=True).numpy() * v.norm(dim=0, keepdim=True).numpy() / math.sqrt(4100)
    assert np.sqrt(np.square(errors / sizes).mean()) < 6 * 2.0**-53
