"""Products in 16 bits: in float32 and rounded once, where the processor has no units for them."""

from __future__ import annotations

import pytest
import torch

from obfuscatune.worker import backend
from obfuscatune.worker.backend import Computer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 9, 200])
@pytest.mark.parametrize("transpose", [False, True])
def test_without_units_for_it_a_product_is_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, transpose: bool
) -> None:
    """Strip by strip; the smaller matrix comes second, in the memory of the larger one's strips."""
    monkeypatch.setattr(backend, "has_units_for", lambda asked: asked == torch.float32)
    monkeypatch.setattr(backend, "WIDENED_ELEMENTS", 96 * 70)
    computer = Computer(torch.device("cpu"))
    for p, q in ((160, 96), (64, 96)):
        generator = torch.Generator().manual_seed(p)
        matrix = torch.randn(p, q, generator=generator).to(dtype)
        factor = matrix.T if transpose else matrix
        x = torch.randn(rows, factor.shape[0], generator=generator).to(dtype)
        computer.multiply(x, matrix, out := torch.empty(rows, factor.shape[1], dtype=dtype), transpose=transpose)
        exact = x.double() @ factor.double()
        ulp = torch.finfo(dtype).eps * exact.abs() + 1e-5
        assert ((out.double() - exact).abs() <= 0.51 * ulp).all()
        assert computer._wide.numel() <= 96 * 70, "no more than a strip is held in float32"
