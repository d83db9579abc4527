"""Mixing: undone exactly, fresh every time, dense, for one row and for thousands."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obfuscatune import RootKey
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.mixing import DENSE_BELOW, SIZE_OF_ROWS, KroneckerMixer, Mixing, NoMixer

KEY = RootKey(b"m" * 32)
ROWS = (1, 2, 3, 15, 16, 17, 32, 33, 47, 48, 97, 512, 1009, 4096)


def mixer(shield_rows: int = 16) -> KroneckerMixer:
    return KroneckerMixer(shield_rows, KEY.stream("mixing", shield_rows))


def mix(mixing: Mixing, x: Tensor) -> Tensor:
    """A [D x; N]."""
    mixed = x.new_empty(mixing.rows, x.shape[1])
    mixing.mix(mixing.scaled(x), mixed)
    return mixed


def some(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return KEY.stream("x", *shape).normal(*shape, dtype=dtype)


@settings(deadline=None, max_examples=40)
@given(st.one_of(st.sampled_from(ROWS[:-2]), st.integers(1, 300)), st.sampled_from([0, 1, 16, 40]), st.integers(1, 5))
def test_unmixing_undoes_mixing(rows: int, shield_rows: int, columns: int) -> None:
    x, mixing = some(rows, columns), mixer(shield_rows).draw(rows, columns)
    mixed = mix(mixing, x)
    assert mixed.shape[1] == columns
    assert mixed.shape[0] >= rows + shield_rows
    torch.testing.assert_close(
        mixing.scaled_back(mixing.unmix(mixed)), x, rtol=0, atol=1e-13 * x.abs().max().item() * 10
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_multiplying_between_goes_through(rows: int, dtype: torch.dtype) -> None:
    """(Aᵀ (A [x; N]) W)[:n] = x W, to rounding, row by row."""
    x, W, mixing = some(rows, 8, dtype=dtype), some(8, 5, dtype=dtype), mixer().draw(rows, 8)
    found = mixing.scaled_back(mixing.unmix(mix(mixing, x) @ W))
    assert (found.shape, found.dtype) == ((rows, 5), dtype)
    error, size = (y.double().norm(dim=1) for y in (found - x @ W, x @ W))
    assert (error <= 100 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("rows", [1, 5, 17, 48, 200])
def test_every_row_of_the_request_depends_on_every_row_of_the_call(rows: int) -> None:
    mixing = mixer(0).draw(rows, 3)
    base = some(rows, 3)
    changed = torch.stack([base.index_fill(0, torch.tensor([row]), 7.0) for row in range(rows)])
    requests = torch.stack([mix(mixing, x) for x in changed]) - mix(mixing, base)
    assert (requests.abs().amax(dim=2) > 1e-9).all()


def test_the_same_input_gives_unrelated_requests() -> None:
    """Largest correlation between any row of one request and any of another: that of random rows, no more."""
    x, drawn = some(64, 256), mixer()
    first, second = (torch.nn.functional.normalize(mix(drawn.draw(64, 256), x), dim=1) for _ in range(2))
    assert (first @ second.T).abs().max() < 0.75
    again = torch.nn.functional.normalize(x, dim=1)
    assert (again @ again.T).abs().max() == pytest.approx(1)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_mixing_leaves_open(rows: int, dtype: torch.dtype) -> None:
    """Calls of fewer rows than columns that share a row share a direction, as docs/threat-model.md says.

    The cosine of the least angle between two calls' row spaces: 1 to rounding where they share a row, and no other.
    """
    x, others = some(rows, 256, dtype=dtype), some(rows + 1, 256, dtype=dtype)
    calls = (x, torch.cat([others[:-1], x[:1]]), others)
    first, sharing, apart = (_row_space(mix(mixer().draw(len(call), 256), call)) for call in calls)
    closest, second, *_ = torch.linalg.svdvals(first.T @ sharing).tolist()
    assert closest == pytest.approx(1, abs=1e-5)
    assert max(second, torch.linalg.svdvals(first.T @ apart)[0].item()) < 0.95


def _row_space(request: Tensor) -> Tensor:
    """An orthonormal basis, as columns."""
    return torch.linalg.qr(request.double().T).Q


def test_two_mixers_of_one_stream_never_meet() -> None:
    stream, x = KEY.stream("one"), some(9, 5)
    first, second = (mix(KroneckerMixer(4, stream).draw(9, 5), x) for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_copy_of_the_enclave_sends_other_shield_rows_and_other_mixtures() -> None:
    """Of the same rows: else their difference would show the text's. The copy is made as a snapshot is: unheard of."""
    script = Path(__file__).with_name("copied.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert run.stdout == f"{[0] * 6}\n"


@pytest.mark.parametrize("rows", [3, 60])
def test_threads_draw_other_secrets(rows: int) -> None:
    fresh, x = KroneckerMixer(8, SecretStream.fresh()), some(rows, 70)
    with ThreadPoolExecutor(4) as pool:
        sent = list(pool.map(lambda _: mix(fresh.draw(rows, 70), x), range(100)))
    assert len({request[0, 0].item() for request in sent}) == 100


@pytest.mark.parametrize("rows", [3, 60])
def test_mixed_again_rows_get_another_shield(rows: int) -> None:
    """Two requests of one shield would differ by nothing but x."""
    mixing, x = mixer().draw(rows, 70), some(rows, 70)
    assert torch.linalg.matrix_rank(mix(mixing, x) - mix(mixing, x)) == mixing.rows - rows


def test_how_many_rows_are_few() -> None:
    """With the shield's, as many as one dense factor mixes; none where nothing is mixed."""
    most, drawn = DENSE_BELOW - 8, KroneckerMixer(8, SecretStream.fresh())
    assert [drawn.draw_few(rows, 70, torch.float32) is not None for rows in (1, most, most + 1)] == [True, True, False]
    assert NoMixer().draw_few(1, 70, torch.float32) is None


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_shield_rows_are_as_large_as_the_rows_beside_them(scale: float) -> None:
    """Mixing keeps the norm, so what is over the scaled rows' norm is the shield's."""
    x, mixing = some(20, 50) * scale, KroneckerMixer(200, KEY.stream("shield")).draw(20, 50)
    scaled = mixing.scaled(x)
    mixing.mix(scaled, mixed := x.new_empty(mixing.rows, 50))
    shield = (mixed.pow(2).sum() - scaled.pow(2).sum()) / ((mixing.rows - 20) * 50)
    assert shield.sqrt().item() == pytest.approx(SIZE_OF_ROWS, rel=0.05)
    assert mixed.square().mean().sqrt().item() == pytest.approx(mixing.size, rel=0.05)
    torch.testing.assert_close(mixing.scaled_back(mixing.unmix(mixed)), x, rtol=0, atol=1e-12 * scale)


def test_shield_rows_of_nothing_are_not_nothing() -> None:
    assert mix(mixer().draw(4, 8), torch.zeros(4, 8)).pow(2).sum() > 1


@pytest.mark.parametrize("rows", [1, 16, 17, 100, 4096])
def test_how_many_rows_are_added(rows: int) -> None:
    """The shield rows asked for, and fewer than the square root of all to fill the grid."""
    extra = mix(mixer().draw(rows, 1), torch.ones(rows, 1)).shape[0] - rows
    assert 16 <= extra < 16 + (rows + 16) ** 0.5


def test_no_mixing_is_none() -> None:
    x = some(3, 4)
    mixing = NoMixer().draw(3, 4)
    mixing.mix(mixing.scaled(x), sent := x.new_empty(mixing.rows, 4))
    assert torch.equal(sent, x)
    assert torch.equal(mixing.scaled_back(mixing.unmix(sent)), x)
    assert mixing.unmix(sent).data_ptr() != sent.data_ptr()  # the worker could change what it sent


def test_of_a_request_in_a_bucket_the_number_of_rows_tells_the_bucket_alone() -> None:
    drawn = KroneckerMixer(8, SecretStream.fresh(), in_buckets=True)
    sent = {rows: drawn.draw(rows, 40).rows for rows in range(1, 400)}
    assert {sent[rows] for rows in range(33, 49)} == {sent[33]} == {56}
    assert len(set(sent.values())) == 18  # 1, 2, 3, 4, 6, 8, ..., 512, and the shield rows
    few = {rows: drawn.draw_few(rows, 40, torch.float32) for rows in range(1, 25)}
    assert {mixing.rows for mixing in few.values() if mixing is not None} == {9, 10, 11, 12, 14, 16, 20, 24, 32}
