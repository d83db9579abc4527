"""The native kernels compute what torch's operations do, to rounding, and see every NaN and infinity."""

from __future__ import annotations

import ctypes
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from obfuscatune import RootKey, native
from obfuscatune.enclave import kernels
from obfuscatune.enclave.kernels import REFERENCE, Native
from obfuscatune.enclave.kernels.interface import Rotation
from obfuscatune.enclave.mixing import KroneckerMixer, KroneckerMixing
from obfuscatune.enclave.transforms.structured import StructuredTransform
from obfuscatune.errors import BadReply

if not native.are_there():
    pytest.skip("no native kernels here; torch computes", allow_module_level=True)

KEY = RootKey(b"k" * 32)
DIMS = (65, 96, 97, 768, 1021, 1600)  # one grid and two, primes, multiples of a tile and not
ROWS = (1, 2, 7, 17, 32, 33, 70)
MANY_ROWS = tuple(rows for rows in ROWS if rows > 24)
DTYPES = (torch.float32, torch.float64)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def some(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return KEY.stream("x", *shape).normal(*shape).to(dtype)


def structured(dim: int) -> StructuredTransform:
    return StructuredTransform(dim, KEY.stream("transform", dim))


def rotation(R: StructuredTransform, dtype: torch.dtype, direction: str = "apply") -> Rotation:
    return R._rotation(dtype, torch.device("cpu"), undo=direction == "inverse")


def by_torch(R: StructuredTransform, x: Tensor, direction: str) -> Tensor:
    return REFERENCE.rotate(x, rotation(R, x.dtype, direction))


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


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Of the largest error to the root mean square."""
    return float((found.double() - exact).abs().max() / exact.square().mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [33, 97, 768])
@pytest.mark.parametrize("direction", ["apply", "inverse"])
def test_contract_rotate(isa: str, direction: str, dim: int, dtype: torch.dtype) -> None:
    by_kernel, R, bias = kernels_of(isa, dtype), rotation(structured(dim), dtype, direction), some(dim, dtype=dtype)
    exact = rotation(structured(dim), torch.float64, direction)
    for rows in (1, 7, 33):
        x = some(rows, dim + 9, dtype=dtype)[:, 4:-5]  # between other columns
        expected = REFERENCE.rotate(x.double(), exact, plus=bias.double())
        for kernel in (by_kernel, REFERENCE):
            assert relative_error(kernel.rotate(x, R, plus=bias), expected) < 100 * torch.finfo(dtype).eps
            own = x.clone(memory_format=torch.contiguous_format)
            assert kernel.rotate(own, R, plus=bias, out=own) is own
            assert relative_error(own, expected) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [33, 96])
def test_contract_mix_and_unmix(isa: str, columns: int, dtype: torch.dtype) -> None:
    by_kernel, within = kernels_of(isa, dtype), 100 * torch.finfo(dtype).eps
    for rows in (1, *MANY_ROWS):
        A = mixing(rows, 60 - rows % 2)._A if rows == 1 else mixing(rows)._A
        x, shield = some(rows, 2 * columns, dtype=dtype)[:, ::2], some(A.order.numel() - rows, columns, dtype=dtype)
        exact = torch.empty(A.order.numel(), columns, dtype=torch.float64)
        REFERENCE.mix(x.double(), shield.double(), A, exact)
        back, _ = REFERENCE.unmix(exact, A)
        for kernel in (by_kernel, REFERENCE):
            mixed = torch.empty(exact.shape, dtype=dtype)
            kernel.mix(x, shield, A, mixed)
            assert relative_error(mixed, exact) < within
            gaps = torch.empty(len(exact), 2 * columns, dtype=dtype)[:, ::2]
            kernel.mix(x, shield, A, gaps)
            assert relative_error(gaps, exact) < within
            for y in (mixed, gaps):
                found, finite = kernel.unmix(y, A)
                assert finite
                assert relative_error(found, back) < within


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 3, 17), (9, 9, 768), (32, 32, 33)])
def test_contract_multiply(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, q = shape[0], shape[1], max(shape[2], kernels_of(isa, dtype).table.lanes)
    left, right = some(m, k, dtype=dtype), some(k, 2 * q, dtype=dtype)
    for kernel in (kernels_of(isa, dtype), REFERENCE):
        for factor in (right[:, :q].contiguous(), right[:, ::2]):
            kernel.multiply(left, factor, out := torch.empty(m, q, dtype=dtype))
            torch.testing.assert_close(out, left @ factor, rtol=0, atol=40 * k * torch.finfo(dtype).eps)


@pytest.mark.parametrize("pairs", [16, 4096, 3 * 16384 + 16])
def test_contract_deviates(isa: str, pairs: int) -> None:
    """Random words, and those at which the polynomials' pieces meet: 0, the last, every half of a quarter turn."""
    edges = np.array([(eighth << 29) + step for eighth in range(8) for step in (-256, 0)], dtype=np.int64)
    words = np.frombuffer(KEY.stream("words").random_bytes(8 * pairs), np.uint32).copy()
    words[: len(edges)] = words[pairs : pairs + len(edges)] = edges % 2**32
    first, second = (words.reshape(2, pairs) >> 8).astype(np.float64) * 2.0**-24
    radius, angle = np.sqrt(-2 * np.log1p(-first)), 2 * np.pi * second
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    by_torch = REFERENCE.deviates(words)  # numpy's angle, up to 2π, is rounded by 2.4e-7, times a radius of up to 5.8
    assert np.abs(by_torch - expected).max() < 3e-6
    found = kernels_of(isa, torch.float32).deviates(words)
    assert np.abs(found - expected).max() < 1e-6  # of 5.8 at most, whose last bit is 5e-7


def test_threads_are_torchs_own() -> None:
    """The library brings no OpenMP, and is linked against none: it calls the one that torch has loaded."""
    everywhere = ctypes.CDLL(None)  # where what a library was not linked against is looked up
    loaded = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.rpartition("/")[2].startswith(("libgomp", "libiomp", "libomp"))
    }
    assert len(loaded) == 1, loaded
    assert ctypes.cast(everywhere.GOMP_parallel, ctypes.c_void_p).value == parallel_of(loaded.pop())


def parallel_of(path: str) -> int | None:
    return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value


def mixing(rows: int, shield_rows: int = 8, name: str = "m") -> KroneckerMixing:
    A = KroneckerMixer(shield_rows, KEY.stream(name, rows)).draw(rows, 1)
    assert isinstance(A, KroneckerMixing)
    return A


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("direction", ["apply", "inverse"])
def test_a_rotation_errs_no_more_than_torch(direction: str, dim: int, dtype: torch.dtype) -> None:
    """Sums in another order: the same error but for chance, which over 10,000 elements is 1 % of it.

    In float64, where torch is held against itself and is the exact one, a few roundings.
    """
    R = structured(dim)
    for rows in ROWS:
        x = some(-(-10_000 // (rows * dim)) * rows, dim, dtype=dtype)
        parts = x.split(rows)
        exact = by_torch(R, x.double(), direction)
        expected = torch.cat([by_torch(R, part, direction) for part in parts])
        found = torch.cat([getattr(R, direction)(part) for part in parts])
        assert (found.shape, found.dtype) == (x.shape, dtype)
        norm = x.double().norm(dim=1, keepdim=True) / dim**0.5
        error, allowed = ((y.double() - exact).div(norm).square().mean().sqrt() for y in (found, expected))
        assert error <= 1.1 * allowed + 4 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [17, *DIMS])
def test_a_bias_is_added_on_the_way_to_the_same_bits(dim: int, dtype: torch.dtype) -> None:
    R, bias = structured(dim), some(dim, dtype=dtype)
    gaps = torch.stack([bias, bias], dim=1)[:, 0]
    for rows in ROWS:
        x = some(rows, dim, dtype=dtype)
        expected = R.inverse(x) + bias
        for found in (R.inverse_plus(x, bias), R.inverse_plus(x, gaps), R.inverse_plus(x, torch.nn.Parameter(bias))):
            assert torch.equal(found.detach(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [65, 96, 1021])
def test_mixing_errs_no_more_than_torch(columns: int, dtype: torch.dtype) -> None:
    for rows in MANY_ROWS:
        x = some(rows, columns, dtype=dtype)
        found, expected, exact = (
            torch.empty(mixing(rows).rows, columns, dtype=d) for d in (dtype, dtype, torch.float64)
        )
        A = mixing(rows)
        A.mix(scaled := A.scaled(x), found)
        REFERENCE.mix(scaled, A.shield, A._A, expected)
        REFERENCE.mix(scaled.double(), A.shield.double(), A._A, exact)
        errors = [(y.double() - exact).square().mean().sqrt() for y in (found, expected)]
        assert errors[0] <= 1.2 * errors[1] + 4 * torch.finfo(torch.float64).eps
        back, _ = REFERENCE.unmix(exact, A._A)
        unmixed_twice = unmixed(found, A)[0], REFERENCE.unmix(found, A._A)[0]
        errors = [(y.double() - back).square().mean().sqrt() for y in unmixed_twice]
        assert errors[0] <= 1.2 * errors[1] + 4 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("view", ["columns", "every other row", "one row again and again"])
def test_rows_need_not_lie_side_by_side(view: str) -> None:
    R, base = structured(97), some(70, 200, dtype=torch.float32)
    x = {
        "columns": base[:, 50:147],
        "every other row": base[::2, :97],
        "one row again and again": base[:1, :97].expand(40, 97),
    }[view]
    assert torch.equal(R.apply(x), R.apply(x.contiguous()))
    A = mixing(x.shape[0])
    found = x.new_empty(A.rows, 97)
    A.mix(A.scaled(x), found)
    torch.testing.assert_close(A.scaled_back(A.unmix(found)), x.contiguous(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("columns", [97, 768])
def test_unmixing_sees_every_number_that_is_not_finite(columns: int) -> None:
    A = mixing(70)
    clean = some(A.rows, columns, dtype=torch.float32) * 1e37  # large, but finite: sums of squares are not
    assert unmixed(clean, A)[1]
    for row in range(A.rows):
        y = clean.clone()
        y[row, row * 7919 % columns] = NOT_FINITE[row % 3]
        assert not unmixed(y, A)[1], f"row {row}"
        with pytest.raises(BadReply):
            A.unmix(y)
    for column in range(columns):
        y = clean.clone()
        y[column % A.rows, column] = NOT_FINITE[column % 3]
        assert not unmixed(y, A)[1], f"column {column}"


def unmixed(y: Tensor, A: KroneckerMixing) -> tuple[Tensor, bool]:
    by_kernel = kernels.native_for(y)
    assert by_kernel is not None
    return by_kernel.unmix(y, A._A)


def test_mixing_writes_nothing_outside_its_place(two_threads: None) -> None:
    A, x = mixing(70), some(70, 97, dtype=torch.float32)
    memory = torch.full((A.rows * 97 + 200,), 7.0)
    A.mix(A.scaled(x), memory[100:-100].view(A.rows, 97))
    assert bool((memory[:100] == 7).all() and (memory[-100:] == 7).all())
    y = memory[100:-100].view(A.rows, 97).clone()
    assert torch.equal(A.unmix(memory[100:-100].view(A.rows, 97)), A.unmix(y)), "what it reads it leaves as it is"


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    R, x, A = structured(768), some(200, 768, dtype=torch.float32), mixing(200)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            mixed = x.new_empty(A.rows, 768)
            kernels.kernels_for(x).mix(x, x[: A.rows - 200], A._A, mixed)
            found.append((R.apply(x), R.inverse(x), mixed, unmixed(mixed, A)[0]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_callers_do_not_disturb_each_other(two_threads: None) -> None:
    """Scratch memory is each Python thread's own."""
    work = [(structured(dim), some(100, dim, dtype=torch.float32)) for dim in (96, 768, 1021, 1600)] * 5
    alone = [R.apply(x) for R, x in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: job[0].apply(job[1]), work))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_gradients_go_through_torch() -> None:
    R, x = structured(97), some(3, 97, dtype=torch.float32).requires_grad_()
    g = some(3, 97, dtype=torch.float32) + 1
    R.apply(x).backward(g)
    torch.testing.assert_close(x.grad, R.apply_transpose(g), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [
        some(3, 768, dtype=torch.bfloat16),
        some(3, 7, dtype=torch.float32),
        some(768, 3, dtype=torch.float32).T,
        some(3, 768, dtype=torch.float32).to("meta"),
        some(3, 768, dtype=torch.float32)[:0],
    ],
    ids=["16 bits", "short rows", "columns side by side", "no memory", "no rows"],
)
def test_the_rest_is_left_to_torch(x: Tensor) -> None:
    assert kernels.native_for(x) is None


@pytest.fixture
def as_if_started_anew() -> Iterator[None]:
    """Whether there are kernels is found out once in a process: here again, and afterwards once more."""
    forget = (native.are_there.cache_clear, native.kernels_of.cache_clear, native._library.cache_clear)
    for clear in (*forget, kernels._native_of.cache_clear):
        clear()
    yield
    for clear in (*forget, kernels._native_of.cache_clear):
        clear()


@pytest.mark.parametrize("how", ["switched off", "not built", "another version", "not a library"])
def test_without_kernels_torch_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    as_if_started_anew: None,
    how: str,
) -> None:
    R, x, A = structured(768), some(33, 768), mixing(33)
    mixed = x.new_empty(A.rows, 768)
    A.mix(A.scaled(x), mixed)
    found = R.apply(x), A.unmix(mixed)
    native.are_there.cache_clear()
    native.kernels_of.cache_clear()
    native._library.cache_clear()
    if how == "switched off":
        monkeypatch.setenv(native.SWITCH, "0")
    elif how == "another version":
        monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    else:
        monkeypatch.setattr(native, "LIBRARY", tmp_path / "kernels.so")
        if how == "not a library":
            shutil.copy(__file__, tmp_path / "kernels.so")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert kernels.kernels_for(x) is REFERENCE
    assert len(caplog.records) == (how != "switched off"), "said once"
    for with_, without in zip(found, (R.apply(x), A.unmix(mixed)), strict=True):
        torch.testing.assert_close(with_, without, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_matrices_are_transformed_as_by_torch(monkeypatch: pytest.MonkeyPatch, dim: int, dtype: torch.dtype) -> None:
    """From either side, and in columns that lie between others."""
    R, W = structured(dim), some(dim, 150, dtype=dtype)[:, 20:131]
    found = R.weight_left(W, wide=dtype), R.weight_right(W.T.contiguous(), wide=dtype)
    monkeypatch.setattr(kernels, "native_for", lambda x: None)
    expected = R.weight_left(W, wide=dtype), R.weight_right(W.T.contiguous(), wide=dtype)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=40 * torch.finfo(dtype).eps)


def test_streams_draw_the_same_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in between: what is drawn next must not depend on how the last was computed."""

    def draw() -> list[Tensor]:
        stream = KEY.stream("alike")
        return [stream.normal(*shape, dtype=torch.float32) for shape in ((3, 5), (300, 700), (1,))]

    drawn = draw()
    monkeypatch.setattr(kernels, "for_deviates", lambda: REFERENCE)
    for by_kernel, by_numpy in zip(drawn, draw(), strict=True):
        # numpy's angle, up to 2π, is rounded by 2.4e-7 and multiplied by a radius of up to 5.8
        torch.testing.assert_close(by_kernel, by_numpy, rtol=0, atol=3e-6)
