"""W_star made in W's place: the same as by dense matrices, in every dtype, whatever the sizes and the threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from obfuscatune import RootKey
from obfuscatune.enclave import kernels, tiles
from obfuscatune.enclave.tiles import transform_in_place
from obfuscatune.enclave.transforms import Transform, TransformSpec

KEY = RootKey(b"p" * 32)
SHAPES = [(1, 1), (3, 7), (48, 67), (97, 200), (256, 96), (131, 64)]  # one grid, two grids, dense; p < q, p > q
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Of a number of that dtype, twice over, or in float64 of sums over some hundred terms."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles either way, the last of them narrower."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1 << 11)


def pair(spec: str, p: int, q: int) -> tuple[Transform, Transform]:
    parsed = TransformSpec.parse(spec)
    return parsed.make(p, KEY.stream(spec, p, "in")), parsed.make(q, KEY.stream(spec, q, "out"))


def matrix(p: int, q: int, dtype: torch.dtype) -> Tensor:
    return KEY.stream("W", p, q).normal(p, q).to(dtype)


def dense(transform: Transform) -> Tensor:
    return transform.apply(torch.eye(transform.dim, dtype=torch.float64))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("p", "q"), SHAPES)
@pytest.mark.parametrize("spec", ["structured", "haar", "identity"])
def test_it_is_the_product_of_dense_matrices(spec: str, p: int, q: int, dtype: torch.dtype) -> None:
    (R_in, R_out), W = pair(spec, p, q), matrix(p, q, dtype)
    expected = dense(R_in).T @ W.double() @ dense(R_out)
    W_star = transform_in_place(W, R_in, R_out)
    assert W_star is W
    torch.testing.assert_close(W.double(), expected, rtol=0, atol=ROUNDING[dtype] * expected.abs().max().item())


@pytest.mark.parametrize("by", ["kernels", "panels"])
@pytest.mark.parametrize(("p", "q"), [*SHAPES, (520, 333), (70, 1031)])
def test_in_its_own_dtype_too(monkeypatch: pytest.MonkeyPatch, by: str, p: int, q: int) -> None:
    """Many tiles of the kernels, the last of them not full."""
    if by == "panels":
        monkeypatch.setattr(kernels, "native_for", lambda x: None)
    (R_in, R_out), W = pair("structured", p, q), matrix(p, q, torch.float32)
    expected = dense(R_in).T @ W.double() @ dense(R_out)
    transform_in_place(W, R_in, R_out, wide=torch.float32)
    assert torch.linalg.vector_norm(W - expected) < 5e-7 * torch.linalg.vector_norm(expected)


def test_an_amplifying_transform_is_inverted_on_the_left() -> None:
    (R_in, R_out), W = pair("conditioned(32)", 48, 67), matrix(48, 67, torch.float64)
    expected = torch.linalg.inv(dense(R_in)) @ W @ dense(R_out)
    torch.testing.assert_close(transform_in_place(W, R_in, R_out), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wide", [torch.float64, torch.float32], ids=str)
def test_threads_change_no_bit(two_threads: None, wide: torch.dtype) -> None:
    """Else a worker that keeps matrices by their content would be sent them all again by another machine."""
    (R_in, R_out), W = pair("structured", 131, 96), matrix(131, 96, torch.float32)
    by_two = transform_in_place(W.clone(), R_in, R_out, wide=wide)
    torch.set_num_threads(1)
    assert torch.equal(transform_in_place(W.clone(), R_in, R_out, wide=wide), by_two)


def test_threads_that_are_started_later_have_their_cores(two_threads: None) -> None:
    transform_in_place(matrix(48, 67, torch.float32), *pair("structured", 48, 67))
    assert torch.get_num_threads() == 2
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2]


def test_what_one_panel_raises_is_raised_and_the_cores_are_given_back(two_threads: None) -> None:
    R_in, R_out = pair("structured", 48, 67)
    with pytest.raises((IndexError, RuntimeError)):
        transform_in_place(matrix(48, 67, torch.float32), R_out, R_in)
    assert torch.get_num_threads() == 2
