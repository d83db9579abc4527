"""What products are checked by, from one pass over W: as exact as torch's three passes, at any shape."""

from __future__ import annotations

import pytest
import torch

from obfuscatune import RootKey
from obfuscatune.enclave import kernels

if not kernels.are_there():
    pytest.skip("no kernels can be compiled here; torch computes", allow_module_level=True)

from obfuscatune.enclave.kernels.images import CHUNK, images
from obfuscatune.enclave.verify import Verifier, _images
from obfuscatune.jit.engine import shape_for
from obfuscatune.wire.errors import WrongProduct

KEY = RootKey(b"i" * 32)
SHAPES = [(1, 1), (3, 5), (1, 64), (2, 65), (7, 300), (CHUNK, 128), (CHUNK + 1, 97), (2 * CHUNK + 3, 515), (64, 4100)]


def some(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return KEY.stream("some", *shape).normal(*shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("p", "q"), SHAPES)
def test_they_are_the_products(p: int, q: int, dtype: torch.dtype) -> None:
    W, R, L = some(p, q), some(q, 8), some(p, 8)
    W_R, Wt_L, norm = images(W.to(dtype), R.to(dtype), L.to(dtype))
    wide = [m.to(dtype).double() for m in (W, R, L)]
    within = 32 * torch.finfo(dtype).eps
    scale = float(wide[0].norm())
    torch.testing.assert_close(W_R.double(), wide[0] @ wide[1], rtol=0, atol=within * scale)
    torch.testing.assert_close(Wt_L.double(), wide[0].T @ wide[2], rtol=0, atol=within * scale)
    assert norm == pytest.approx(scale, rel=within)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [{"avx2": True, "fma": True}, {}])
def test_other_registers_give_the_same(features: dict[str, bool], dtype: torch.dtype) -> None:
    W, R, L = (some(*shape, dtype=dtype) for shape in ((130, 259), (259, 8), (130, 8)))
    narrow, own = images(W, R, L, shape_for(dtype.itemsize, features)), images(W, R, L)
    within = 32 * torch.finfo(dtype).eps
    for one, other in zip(narrow[:2], own[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=within * own[2])
    assert narrow[2] == pytest.approx(own[2], rel=within)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    W = some(100, 130)
    W[99, 129] = value
    W_R, Wt_L, norm = images(W, some(130, 8), some(100, 8))
    assert not W_R[99].isfinite().any()
    assert W_R[:99].isfinite().all()
    assert not Wt_L[129].isfinite().any()
    assert not torch.tensor(norm).isfinite()


def test_where_no_kernel_applies_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    W, R, L = some(40, 96), some(96, 8), some(40, 8)
    own = _images(W, R, L)
    monkeypatch.setattr(kernels, "are_there", lambda: False)
    torchs = _images(W, R, L)
    for one, other in zip(own[:2], torchs[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert own[2] == pytest.approx(torchs[2])


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_check_by_either_takes_the_product_and_nothing_else(
    by_kernel: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_kernel:
        monkeypatch.setattr(kernels, "are_there", lambda: False)
    W = some(CHUNK + 3, 259, dtype=dtype)
    verifier = Verifier(W, KEY.stream("verifier"), 1.0)
    for transpose, matrix in ((False, W), (True, W.T)):
        x = some(40, matrix.shape[0], dtype=dtype)
        probe = verifier.probe(transpose=transpose)
        u, product = x @ probe.v, x @ matrix
        probe.check(product, u, 1.0, dtype)
        product[39, -1] *= 1.1
        with pytest.raises(WrongProduct):
            probe.check(product, u, 1.0, dtype)
