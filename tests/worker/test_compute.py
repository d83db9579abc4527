"""Products with a matrix that is coarser than what is computed in.

16 bits are widened to float32 where the processor has no units for them, and anything to float64 for rows in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from obfuscatune import native
from obfuscatune.backend import Computer
from obfuscatune.backend import computer as backend
from obfuscatune.backend.streams import full_precision
from obfuscatune.enclave.client import WorkerClient
from tests.worker.serving import serving

L = 2.0**28
"""Deviation of one-time masks."""
ID = bytes(range(1, 17))


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


@pytest.mark.parametrize("native_kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 257, 129), (7, 96, 64), (130, 61, 777), (300, 96, 130)])
@pytest.mark.parametrize("transpose", [False, True])
def test_rows_in_float64_are_multiplied_in_float64(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    transpose: bool,
    native_kernels: bool,
) -> None:
    """To a few roundings of float64; float32 would err by 1e-7. With rows and `out` that have gaps, too."""
    if not native_kernels:
        monkeypatch.setattr(native, "kernels", lambda itemsize: None)
    monkeypatch.setattr(backend, "WIDENED_ELEMENTS", 5000)
    (m, p, q), generator = shape, torch.Generator().manual_seed(sum(shape))
    matrix = torch.randn(p, q, generator=generator).to(dtype)
    factor = matrix.double().T if transpose else matrix.double()
    rows = torch.randn(m, 2 * factor.shape[0], generator=generator, dtype=torch.float64) * L
    for x in (rows[:, ::2].contiguous(), rows[:, ::2]):
        out = torch.full((m, factor.shape[1]), torch.nan, dtype=torch.float64)
        Computer(torch.device("cpu")).multiply(x, matrix, out, transpose=transpose)
        assert ((out - x @ factor).abs() <= 1e-14 * (x.abs() @ factor.abs())).all()
        single = torch.empty(out.shape)
        Computer(torch.device("cpu")).multiply(x, matrix, single, transpose=transpose)
        assert torch.equal(single, out.float()), "a reply in float32 is rounded once"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp32_precision", "tf32"),
        ("allow_tf32", True),
        ("allow_fp16_accumulation", True),
        ("allow_fp16_reduced_precision_reduction", True),
        ("allow_bf16_reduced_precision_reduction", True),
        ("allow_bf16_reduced_precision_reduction", (False, False)),
    ],
)
def test_a_cuda_product_is_launched_in_full_precision(name: str, value: Any) -> None:
    """By whatever setting somebody has made others coarse: with `fp32_precision`, torch's older functions raise."""
    matmul: Any = torch.backends.cuda.matmul
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    splits = f"{name}_split_k"
    chosen = getattr(matmul, name), getattr(matmul, splits, None)
    try:
        with full_precision():
            assert matmul.fp32_precision in ("none", "ieee")
            assert not matmul.allow_fp16_accumulation
            assert not matmul.allow_fp16_reduced_precision_reduction
            assert not matmul.allow_bf16_reduced_precision_reduction
        assert (getattr(matmul, name), getattr(matmul, splits, None)) == chosen
    finally:
        setattr(matmul, name, before)


def test_a_matrix_in_float64_takes_coarser_rows() -> None:
    matrix, rows = torch.eye(70, dtype=torch.float64) / 3, torch.ones(3, 70, dtype=torch.float32)
    Computer(torch.device("cpu")).multiply(rows, matrix, out := torch.empty(3, 70).double(), transpose=False)
    assert torch.equal(out, torch.ones(3, 70, dtype=torch.float64) / 3)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows", [1, 9, 200])
def test_a_masked_product_comes_back_exact_from_a_worker(tmp_path: Path, rows: int, transpose: bool) -> None:
    """(x + r) W - r W by a real server: what is left of masks 2²⁸ times as large as x is 2²⁸ roundings of float64."""
    generator = torch.Generator().manual_seed(rows)
    W = torch.randn(96, 130, generator=generator)
    factor = W.double().T if transpose else W.double()
    x = torch.randn(rows, factor.shape[0], generator=generator, dtype=torch.float64)
    r = torch.randn(x.shape, generator=generator, dtype=torch.float64) * L
    masked = x + r
    with serving(tmp_path) as worker, WorkerClient.open(str(worker.address)) as link:
        link.store(ID, lambda: W, shape=(96, 130), dtype=W.dtype)
        product = link.multiply(ID, masked, transpose=transpose)
        of_mask = link.multiply(ID, r, transpose=transpose)
    assert product.dtype == torch.float64
    y = (masked - r) @ factor
    assert float((product - of_mask - y).abs().max()) <= 1e-14 * L * float((factor.abs().sum(dim=0)).max())
