"""The worker's native kernel computes what torch does, to rounding, at every size that it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune import native
from obfuscatune.backend import Computer
from obfuscatune.backend import computer as backend

if not native.are_there():
    pytest.skip("no native kernels here; torch computes", allow_module_level=True)

DTYPES = (torch.float32, torch.float64)
PAIRS = ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float64, torch.float32))
"""Of rows and of the matrix."""


def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(64, 400), st.sampled_from(PAIRS), st.integers(1, 3))
def test_it_computes_the_product(m: int, p: int, q: int, dtypes: tuple[torch.dtype, torch.dtype], threads: int) -> None:
    """Also into columns that lie between others, which stay as they are."""
    dtype = dtypes[0]
    rows, matrix = some(m, p, dtype=dtype), some(p, q, dtype=dtypes[1])
    memory = torch.full((m, q + 5), 7.0, dtype=dtype)
    out = memory[:, 2:-3].fill_(torch.nan)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        backend.multiply_few_rows(rows, matrix, out)
    finally:
        torch.set_num_threads(before)
    exact = rows.double() @ matrix.double()
    bound = p * torch.finfo(dtype).eps * (rows.double().abs() @ matrix.double().abs())
    assert ((out.double() - exact).abs() <= bound).all()
    assert (memory[:, :2] == 7).all()
    assert (memory[:, -3:] == 7).all()


def test_it_rounds_no_more_than_blas() -> None:
    """Less: sums of 16 before they are added up. With one sum after another it would be three times BLAS's."""
    rows, matrix, out = some(9, 3072), some(3072, 768), torch.empty(9, 768)
    exact = rows.double() @ matrix.double()
    backend.multiply_few_rows(rows, matrix, out)
    assert (out - exact).norm() <= 1.1 * (rows @ matrix - exact).norm()


def test_every_instruction_set_widens_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in native.ISAS:
        table = native.kernels_of(isa, 8)
        if table is None:
            continue
        monkeypatch.setattr(native, "kernels", lambda itemsize, table=table: table)
        for m, p, q in ((1, 768, 200), (5, 17, 131), (64, 100, 64)):
            rows, matrix = some(m, p, dtype=torch.float64), some(p, q)
            backend.multiply_few_rows(rows, matrix, out := torch.empty(m, q, dtype=torch.float64))
            assert ((out - rows @ matrix.double()).abs() <= 1e-14 * (rows.abs() @ matrix.double().abs())).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    rows, matrix, out = some(3, 40), some(40, 97), torch.empty(3, 97)
    matrix[17, 96] = value
    backend.multiply_few_rows(rows, matrix, out)
    assert not torch.isfinite(out[:, 96]).any()
    assert torch.isfinite(out[:, :96]).all()


def test_the_computer_uses_it_where_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for one row, nor for many; not for the transpose, nor between dtypes, nor for a matrix with gaps."""
    used = []
    monkeypatch.setattr(backend, "multiply_few_rows", lambda rows, matrix, out: used.append(rows.shape[0]))
    computer, matrix = Computer(torch.device("cpu")), some(32, 64)
    for m in (1, 2, 9, 128, 129):
        computer.multiply(some(m, 32), matrix, torch.empty(m, 64), transpose=False)
    assert used == [2, 9, 128]
    computer.multiply(some(9, 64), matrix, torch.empty(9, 32), transpose=True)
    monkeypatch.setattr(backend, "has_units_for", lambda dtype: True)  # else it is widened first, and wins
    computer.multiply(some(9, 32).bfloat16(), matrix.bfloat16(), torch.empty(9, 64).bfloat16(), transpose=False)
    computer.multiply(some(9, 32), some(32, 128)[:, ::2], torch.empty(9, 64), transpose=False)
    computer.multiply(some(9, 32), some(32, 8), torch.empty(9, 8), transpose=False)
    computer.multiply(some(32, 9).T, matrix, torch.empty(9, 64), transpose=False)
    assert used == [2, 9, 128]


def test_the_computer_uses_it_for_rows_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix in float32, also for one row, and whatever the reply's dtype is."""
    used = []
    monkeypatch.setattr(backend, "multiply_few_rows", lambda rows, matrix, out: used.append(matrix.dtype))
    computer, matrix = Computer(torch.device("cpu")), some(32, 64)
    for m in (1, backend.MOST_WIDENED, backend.MOST_WIDENED + 1):
        computer.multiply(some(m, 32).double(), matrix, torch.empty(m, 64).double(), transpose=False)
    computer.multiply(some(9, 32).double(), matrix, torch.empty(9, 64), transpose=False)
    computer.multiply(some(9, 64).double(), matrix, torch.empty(9, 32).double(), transpose=True)
    assert used == [torch.float32] * 3


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBFUSCATUNE_KERNELS", "0")
    native.are_there.cache_clear()
    try:
        assert not backend.few_rows_apply(some(9, 32), some(32, 64), torch.empty(9, 64))
    finally:
        native.are_there.cache_clear()
