"""Many rows times a matrix, handed out in parts: what torch's product is, to rounding, at every size and either way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.enclave.link import WorkerLink
from obfuscatune.enclave.local import local_worker
from obfuscatune.worker import compute, kernels
from obfuscatune.worker.compute import Computer

if not (kernels.are_there() and kernels.can_call_blas()):
    pytest.skip("no BLAS that kernels can call here; torch computes in one piece", allow_module_level=True)

from obfuscatune.worker.kernels import blas, parts

DTYPES = (torch.float32, torch.float64)


def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 150), st.integers(1, 90), st.integers(1, 700), st.sampled_from(DTYPES), st.booleans(),
    st.integers(1, 3),
)  # fmt: skip
def test_it_computes_the_product(
    m: int, inner: int, columns: int, dtype: torch.dtype, transpose: bool, threads: int
) -> None:
    rows, matrix = some(m, inner, dtype=dtype), some(inner, columns, dtype=dtype)
    matrix = matrix.T.contiguous() if transpose else matrix
    memory = torch.full((m * columns + 20,), 7.0, dtype=dtype)
    out = memory[10:-10].view(m, columns).fill_(torch.nan)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts.multiply(rows, matrix, out, transpose=transpose)
    finally:
        torch.set_num_threads(before)
    factor = (matrix.T if transpose else matrix).double()
    bound = (inner + 1) * torch.finfo(dtype).eps * (rows.double().abs() @ factor.abs())
    assert ((out.double() - rows.double() @ factor).abs() <= bound).all()
    assert (torch.cat([memory[:10], memory[-10:]]) == 7).all(), "nothing is written beside the product"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    rows, matrix, out = some(140, 40), some(40, 197), torch.empty(140, 197)
    matrix[17, 196] = value
    parts.multiply(rows, matrix, out, transpose=False)
    assert not torch.isfinite(out[:, 196]).any()
    assert torch.isfinite(out[:, :196]).all()


@pytest.mark.parametrize(("columns", "threads"), [(1, 2), (64, 2), (768, 2), (3072, 2), (3072, 16), (50257, 4)])
def test_parts_are_many_and_not_narrow(columns: int, threads: int) -> None:
    width = parts.part_width(columns, threads)
    assert parts.NARROWEST <= width <= parts.WIDEST
    assert width == parts.NARROWEST or -(-columns // width) >= min(parts.PARTS_PER_THREAD * threads, 6)


def test_the_computer_uses_it_where_it_wins(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    """Not for small products, nor between dtypes, nor for rows or a matrix with gaps, nor on one thread."""
    used = []
    monkeypatch.setattr(parts, "multiply", lambda rows, matrix, out, transpose: used.append((len(rows), transpose)))
    computer, matrix = Computer(torch.device("cpu")), some(256, 300)

    def multiply(rows: torch.Tensor, matrix: torch.Tensor = matrix, *, transpose: bool = False) -> None:
        columns = matrix.shape[0 if transpose else 1]
        computer.multiply(rows, matrix, torch.empty(len(rows), columns, dtype=rows.dtype), transpose=transpose)

    multiply(some(300, 256))
    multiply(some(300, 300), transpose=True)
    assert used == [(300, False), (300, True)]
    multiply(some(200, 256))
    multiply(some(300, 256).double())
    monkeypatch.setattr(compute, "has_units_for", lambda dtype: True)  # else it is widened first, and wins
    multiply(some(300, 256).bfloat16(), matrix.bfloat16())
    multiply(some(256, 300).T)
    multiply(some(300, 256), some(256, 600)[:, ::2])
    torch.set_num_threads(1)
    multiply(some(300, 256))
    assert len(used) == 2


@pytest.mark.parametrize("name", ["no MKL", "no such function", "another one", "no library"])
def test_without_such_a_product_torch_computes(monkeypatch: pytest.MonkeyPatch, name: str, two_threads: None) -> None:
    blas.gemm.cache_clear()
    kernels.can_call_blas.cache_clear()
    if name == "no MKL":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    elif name == "no such function":
        monkeypatch.setattr(blas, "_NAMES", {4: "no_such_name_", 8: "dgemm_"})
    elif name == "another one":
        monkeypatch.setattr(parts, "multiply", lambda rows, matrix, out, transpose: out.zero_())
    else:
        monkeypatch.setattr(torch, "__file__", "/nowhere/torch/__init__.py")
    try:
        rows, matrix, out = some(300, 256), some(256, 300), torch.empty(300, 300)
        assert not kernels.apply_in_parts(rows, matrix, out)
        Computer(torch.device("cpu")).multiply(rows, matrix, out, transpose=False)
        torch.testing.assert_close(out, rows @ matrix)
    finally:
        blas.gemm.cache_clear()
        kernels.can_call_blas.cache_clear()


@pytest.mark.parametrize("transpose", [False, True])
def test_a_worker_answers_with_it(transpose: bool) -> None:
    """In a process of its own, from shared memory into shared memory."""
    W = some(257, 301, dtype=torch.float64)
    factor = W.T if transpose else W
    rows = some(300, factor.shape[0], dtype=torch.float64)
    with local_worker(threads=2) as worker, WorkerLink.open(worker.address) as link:
        link.store(key := bytes(range(16)), lambda: W, shape=(257, 301), dtype=W.dtype)
        lent = link.lend(*rows.shape, rows.dtype).copy_(rows)
        found = link.submit(key, lent, transpose=transpose).result()
        torch.testing.assert_close(found, rows @ factor, rtol=0, atol=1e-12)
