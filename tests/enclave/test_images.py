"""What products are checked by, from one pass over W: as exact as torch's three passes, at any shape."""

from __future__ import annotations

import pytest
import torch

from obfuscatune import RootKey
from obfuscatune.enclave import kernels

if not kernels.are_there():
    pytest.skip("no kernels can be compiled here; torch computes", allow_module_level=True)

from obfuscatune.enclave.kernels.images import CHUNK, images
from obfuscatune.enclave.verify import _images
from obfuscatune.jit.engine import shape_for

KEY = RootKey(b"i" * 32)
SHAPES = [(1, 64), (2, 65), (7, 300), (CHUNK, 128), (CHUNK + 1, 97), (2 * CHUNK + 3, 515), (64, 4100)]


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


@pytest.mark.parametrize("features", [{"avx2": True, "fma": True}, {}])
def test_other_registers_give_the_same(features: dict[str, bool]) -> None:
    shape = shape_for(4, features)
    W, R, L = some(130, 259, dtype=torch.float32), some(259, 8, dtype=torch.float32), some(130, 8, dtype=torch.float32)
    for narrow, own in zip(images(W, R, L, shape)[:2], images(W, R, L)[:2], strict=True):
        torch.testing.assert_close(narrow, own, rtol=1e-5, atol=1e-4)


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
