"""One-time masks: normal numbers on a grid, and rows that are rounded to it and masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from obfuscatune import RootKey, native
from obfuscatune.enclave import kernels
from obfuscatune.enclave.kernels import REFERENCE, Kernels, Native
from obfuscatune.enclave.keys import GRID_NORMALS_TOGETHER, SecretStream

KEY = RootKey(b"m" * 32)
GRID, DEVIATION = 2.0**-22, 2.0**28
IMPLEMENTATIONS = ("reference", *native.ISAS)


def implementation(name: str, itemsize: int = 8) -> Kernels:
    if name == "reference":
        return REFERENCE
    table = native.kernels_of(name, itemsize) if native.are_there() else None
    if table is None:
        pytest.skip(f"this processor, or this installation, has no {name}")
    return Native(table)


def words_of(name: str, pairs: int) -> NDArray[np.uint64]:
    return np.frombuffer(KEY.stream(name).random_bytes(16 * pairs), np.uint64).copy()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("pairs", [16, 4096, 3 * 4096 + 16])
def test_contract_grid_normal(name: str, pairs: int) -> None:
    """Against 64-bit significands; first without a grid that matters, then on the grid.

    Random words, and those at which pieces meet: 0, the last, every eighth of a turn, where the logarithm is of another
    number, and words that leave few bits.
    """
    kernel = implementation(name)
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("this platform's long double is a double")
    edges = [(eighth << 61) + step for eighth in range(8) for step in (-1, 0, 1, 1 << 11)]
    edges += [int((1 - 0.5**0.5) * 2**64) + step for step in (-(1 << 12), 0, 1 << 12)] + [1 << bit for bit in range(64)]
    words = words_of("words", pairs)
    some = np.array([edge % 2**64 for edge in edges], np.uint64)[:pairs]
    words[: len(some)] = words[pairs : pairs + len(some)] = some
    first, second = words.reshape(2, pairs).astype(np.longdouble)
    k = np.maximum(np.longdouble(2.0) ** 64 - first, 1)
    unit = np.longdouble(2.0) ** -64
    radius = np.sqrt(-2 * np.where(first < 2.0**63, np.log1p(-first * unit), np.log(k * unit)))
    quarters = np.rint(second * unit * 4)
    angle = (second - quarters * np.longdouble(2.0) ** 62) * unit * 2 * np.arccos(np.longdouble(-1))
    of_turn = quarters.astype(np.int64) % 4
    cosine = np.choose(of_turn, [np.cos(angle), -np.sin(angle), -np.cos(angle), np.sin(angle)])
    sine = np.choose(of_turn, [np.sin(angle), np.cos(angle), -np.sin(angle), -np.cos(angle)])
    exact = np.concatenate([radius * cosine, radius * sine])
    z = kernel.grid_normal(words.copy(), 1.0, 2.0**-200).numpy()
    assert np.isfinite(z).all()
    assert (np.abs(z - exact) <= 2.0**-49 * np.abs(exact) + 1e-30).all()
    r = kernel.grid_normal(words.copy(), DEVIATION, GRID).numpy()
    assert np.array_equal(r, np.rint(r / GRID) * GRID)
    assert (
        np.abs(r + GRID / 2 - exact * DEVIATION) <= GRID * (0.5 + 2.0**-49 * np.abs(exact) * (DEVIATION / GRID))
    ).all()
    assert np.array_equal(r, np.floor(z * (DEVIATION / GRID)) * GRID), "nothing but a rounding more"


@pytest.fixture(scope="module")
def drawn() -> NDArray[np.int64]:
    """Two million masks, in grids."""
    r = KEY.stream("drawn").grid_normal(2, 1_000_000, deviation=DEVIATION, grid=GRID)
    return (r.flatten().numpy() / GRID).astype(np.int64)


def test_moments_are_those_of_a_normal(drawn: NDArray[np.int64]) -> None:
    """Within five standard errors."""
    z, error = drawn / 2.0**50, 5 / len(drawn) ** 0.5
    assert abs(z.mean()) < error
    assert abs((z**2).mean() - 1) < error * 2**0.5
    assert abs((z**3).mean()) < error * 15**0.5
    assert abs((z**4).mean() - 3) < error * 96**0.5
    half = len(z) // 2  # the two of a pair are independent
    for lag in (1, 16, half, GRID_NORMALS_TOGETHER // 2):
        assert abs((z[:-lag] * z[lag:]).mean()) < error * 2**0.5


def test_tails_are_those_of_a_normal(drawn: NDArray[np.int64]) -> None:
    z = np.abs(drawn / 2.0**50)
    for bound in (0.01, 0.5, 1, 2, 3, 4, 4.5):
        share = float(torch.special.erfc(torch.tensor(bound / 2**0.5, dtype=torch.float64)))
        expected = share * len(z)
        assert abs((z > bound).sum() - expected) < 5 * (expected * (1 - share)) ** 0.5, f"beyond {bound}"


@pytest.mark.parametrize(
    ("least", "most"), [(0, 2**53), (0, 2**40), (2**48, 2**49), (2**49, 2**50), (2**50, 2**51), (2**51, 2**52)]
)
def test_low_bits_are_uniform(drawn: NDArray[np.int64], least: int, most: int) -> None:
    """Chi-square of the lowest 8 bits, near 0 and in each binade, within five standard deviations.

    Large numbers have no bits below the grid: rounded to the nearest, ties would be even.
    """
    size = np.abs(drawn)
    some = drawn[(size >= least) & (size < most)]
    counts = np.bincount(some & 255, minlength=256)
    chi_square = float(((counts - len(some) / 256) ** 2 / (len(some) / 256)).sum())
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 97), (70, 768), (9000, 3)])
def test_contract_mask_rows(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Exact: what is subtracted again leaves the rounded row; with gaps, and in the masks' place."""
    kernel, (m, p) = implementation(name, dtype.itemsize), shape
    numbers = KEY.stream("x").normal(m, p + 3)
    r = KEY.stream("r").grid_normal(m, p, deviation=DEVIATION, grid=GRID)
    ties = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 2.0**31 + 1, -0.0], dtype=torch.float64) * GRID
    numbers[0, 1:-2][: len(ties)] = ties[:p]
    x = numbers.to(dtype)[:, 1:-2]
    rounded = torch.round(x.double() / GRID) * GRID
    memory = torch.full((m, p + 4), 7.0, dtype=torch.float64)
    assert kernel.mask_rows(x, r, GRID, memory[:, 1:-3])
    assert torch.equal(memory[:, 1:-3] - r, rounded)
    assert torch.equal(memory[:, 1:-3], rounded + r)
    assert bool((memory[:, 0] == 7).all() and (memory[:, -3:] == 7).all())
    own = r.clone()
    assert kernel.mask_rows(x, own, GRID, own)
    assert torch.equal(own, rounded + r)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_masking_sees_every_number_that_is_not_finite(name: str, value: float) -> None:
    kernel, r = implementation(name, 4), torch.zeros(9, 13, dtype=torch.float64)
    for place in range(9 * 13):
        x = torch.ones(9, 13)
        x.view(-1)[place] = value
        assert not kernel.mask_rows(x, r, GRID, torch.empty_like(r))


def test_masking_takes_what_the_kernel_does_not() -> None:
    r = KEY.stream("r").grid_normal(6, 4, deviation=DEVIATION, grid=GRID)
    for x in (torch.ones(4, 6).T, torch.ones(6, 4).bfloat16(), torch.ones(6, 8)[:, ::2]):
        assert kernels.mask_rows(x, r, GRID, out := torch.empty_like(r))
        assert torch.equal(out, r + 1)
    assert kernels.mask_rows(torch.empty(0, 4), r[:0], GRID, torch.empty_like(r[:0]))


def test_streams_draw_masks() -> None:
    """The same masks from the same stream, also where several parts are drawn; others from others."""

    def draw(stream: SecretStream) -> list[Tensor]:
        shapes: tuple[tuple[int, ...], ...] = ((3, 5), (1,), (GRID_NORMALS_TOGETHER + 7,), (0, 4))
        return [stream.grid_normal(*shape, deviation=DEVIATION, grid=GRID) for shape in shapes]

    once, again = draw(KEY.stream("one")), draw(KEY.stream("one"))
    assert [r.shape for r in once] == [(3, 5), (1,), (GRID_NORMALS_TOGETHER + 7,), (0, 4)]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], draw(KEY.stream("other"))[0])
    fresh = SecretStream.fresh()
    assert not torch.equal(draw(fresh)[0], draw(fresh)[0])
    assert len(once[2].unique()) == once[2].numel()


def test_streams_draw_the_same_masks_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = KEY.stream("alike").grid_normal(300, 700, deviation=DEVIATION, grid=GRID)
    monkeypatch.setattr(kernels, "native_of", lambda itemsize: None)
    by_numpy = KEY.stream("alike").grid_normal(300, 700, deviation=DEVIATION, grid=GRID)
    assert float((found - by_numpy).abs().max()) <= 16 * GRID, "2⁻⁴⁸ of 4 deviations are 16 grids"


def test_the_number_of_threads_changes_no_mask() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(KEY.stream("threads").grid_normal(100_000, deviation=DEVIATION, grid=GRID))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (9, 768), (70, 259)])
def test_contract_unmask_rows(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    kernel = implementation(name, dtype.itemsize)
    product = KEY.stream("product").normal(*shape, dtype=torch.float64) * DEVIATION
    y = product + KEY.stream("y").normal(*shape, dtype=torch.float64)
    expected, out = (y - product).to(dtype), torch.full(shape, torch.nan, dtype=dtype)
    kernel.unmask_rows(y, product, out)
    assert torch.equal(out, expected)
    assert not product.any(), "nothing of the mask is left"
