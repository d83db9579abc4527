"""Rows are scaled to one size by powers of two before they are mixed: no row costs another its precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import obfuscatune
from obfuscatune import RootKey
from obfuscatune.enclave.client import WorkerClient
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.enclave.mixing import SIZE_OF_ROWS, KroneckerMixer, RowScales
from obfuscatune.enclave.product import Held, OffloadedProduct
from obfuscatune.enclave.transforms.structured import StructuredTransform
from obfuscatune.errors import NonFiniteError

KEY = RootKey(b"s" * 32)
ID = bytes(range(1, 17))
P, Q = 320, 256
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def some(*shape: int) -> Tensor:
    return KEY.stream("x", *shape).normal(*shape)


def sizes(x: Tensor) -> Tensor:
    return x.double().square().mean(dim=1).sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_gets_one_size(dtype: torch.dtype) -> None:
    """By a power of two, which rounds nothing; of 16 bits exactly, by a factor that float32 rounds."""
    range_of_sizes = torch.logspace(-3, 3, 50, dtype=torch.float64).unsqueeze(1)
    x = torch.cat([some(50, 33) * range_of_sizes, torch.ones(1, 33), torch.full((1, 33), 0.5)]).to(dtype)
    scales = RowScales.of(x)
    scaled = scales.scaled(x)
    assert scaled.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert ((sizes(scaled) > 0.5 - 1e-6) & (sizes(scaled) <= 1 + 1e-6)).all()
    if dtype in SIXTEEN_BITS:
        assert ((sizes(scaled) - SIZE_OF_ROWS).abs() < 1e-6).all()
        assert torch.equal(scales.undo(scaled.clone()).to(dtype), x)
    else:
        assert (torch.frexp(scales.down).mantissa == 0.5).all()
        assert torch.equal(scales.undo(scaled.clone()), x), "nothing is rounded"
    assert scales.mean_square == pytest.approx(float(scaled.double().square().mean()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_whose_squares_are_no_numbers_are_scaled_as_well(dtype: torch.dtype) -> None:
    """Squares overflow and vanish long before their roots do; so small that no scale is left, a row stays smaller."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    ends = torch.tensor([largest / 8, largest**0.6, smallest**0.6, smallest * 8], dtype=torch.float64)
    x = (some(4, 33).clamp(-4, 4) * ends.unsqueeze(1)).to(dtype)
    scaled = RowScales.of(x).scaled(x)
    assert ((sizes(scaled) > 0.5 - 1e-3) & (sizes(scaled) < 5)).all()
    below = RowScales.of(torch.full((1, 33), smallest / 2, dtype=dtype))
    assert below.up.isfinite().all()
    assert (below.down * smallest / 2 <= 1).all()


def test_rows_of_zeros_stay_zeros() -> None:
    x = torch.stack([torch.zeros(33), torch.full((33,), 1e-30), torch.ones(33)])
    scales = RowScales.of(x)
    assert sizes(scales.scaled(x))[0] == 0
    assert (sizes(scales.scaled(x))[1:] > 0.5).all()
    assert torch.equal(scales.undo(torch.ones(3, 1))[:1], torch.zeros(1, 1)), "what came of it is rounding"
    assert sizes(RowScales.of(x[:1]).scaled(x[:1])) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_refused(value: float, dtype: torch.dtype) -> None:
    for column in (0, 7, 32):
        x = some(5, 33).to(dtype)
        x[3, column] = value
        with pytest.raises(NonFiniteError):
            RowScales.of(x)


@pytest.fixture
def client(worker: LocalWorker) -> Iterator[WorkerClient]:
    with WorkerClient.open(worker.address) as opened:
        yield opened


def offloaded(client: WorkerClient, W: Tensor, dtype: torch.dtype | None = None) -> OffloadedProduct:
    """W (p, q) of the model on a worker, in its own dtype or in another."""
    R_in, R_out = (StructuredTransform(dim, KEY.stream("transform", dim)) for dim in W.shape)
    W_star = R_out.weight_right(R_in.weight_left(W.double())).to(dtype or W.dtype)
    client.store(ID, lambda: W_star, shape=(W.shape[0], W.shape[1]), dtype=W_star.dtype)
    return OffloadedProduct(client, Held(ID, dtype), R_in, R_out, KroneckerMixer(8, SecretStream.fresh()))


def errors(found: Tensor, exact: Tensor) -> Tensor:
    """Of each row, over the row's own size."""
    return (found.double() - exact).norm(dim=1) / exact.norm(dim=1)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("rows", [1, 4, 40, 300])
@pytest.mark.parametrize("massive", [1, 1_000, 10_000])
def test_no_row_errs_much_more_than_in_plain_16_bits(
    client: WorkerClient, massive: int, rows: int, dtype: torch.dtype
) -> None:
    """Forward and backward, row by row, beside a token that has a massive activation; for few rows too, as in decoding.

    Rows, matrix and product are each rounded once more than plain's: a factor of two where all directions count alike.
    """
    W, x, g = (some(P, Q) / P**0.5).to(dtype), some(rows, P), some(rows, Q) * 1e-3
    x[0, 7] *= massive
    g[0, 5] *= massive
    x, g = x.to(dtype), g.to(dtype)
    product = offloaded(client, W)
    y, dx = product.finish_forward(product.start_forward(x)), product.finish_backward(product.start_backward(g))
    for found, plain, exact in (
        (y, x @ W, x.double() @ W.double()),
        (dx, g @ W.T, g.double() @ W.double().T),
    ):
        assert found.dtype == dtype
        assert (errors(found, exact) <= 4 * errors(plain, exact)).all()


@pytest.mark.parametrize("size", [1e-6, 1, 1e6])
def test_what_a_bfloat16_matrix_makes_small_keeps_its_precision(worker: LocalWorker, size: float) -> None:
    """A trained matrix maps some tokens to an eighth of what a random direction gets, as SmolLM2's `v_proj` its first:
    rounding in the worker's basis counts in all directions alike, and eight times as much there. So what crosses of a
    bfloat16 model has float16's bits, whatever the matrix's size is.
    """
    layer = torch.nn.Linear(P, Q, bias=False)
    token = some(1, P)
    along = token / token.norm()
    with torch.no_grad():
        W = some(Q, P) / P**0.5 * size
        layer.weight.copy_(W - 0.9 * (W @ along.T) @ along)
    layer = layer.bfloat16().requires_grad_(False)
    x = torch.cat([token, token * 900, some(20, P)]).bfloat16().requires_grad_()
    exact = x.detach().double() @ layer.weight.double().T
    plain = layer(x)
    g = torch.ones_like(plain)
    (plain_dx,) = torch.autograd.grad(plain, x, g)
    model = torch.nn.Sequential()
    model.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"v_proj": layer})])
    with obfuscatune.protect(model, worker.address, verify=1.0, first_blocks=0):
        y = model.layers[0]["v_proj"](x)
        (dx,) = torch.autograd.grad(y, x, g)
    assert (errors(y.detach(), exact) <= 4 * errors(plain.detach(), exact)).all()
    exact_dx = g.double() @ layer.weight.double()
    assert (errors(dx, exact_dx) <= 4 * errors(plain_dx, exact_dx)).all()


@pytest.mark.parametrize(
    ("dtype", "on_the_wire"), [(torch.float32, None), (torch.float64, None), (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("rows", [3, 60])
def test_rows_of_any_size_keep_their_precision(
    client: WorkerClient, rows: int, dtype: torch.dtype, on_the_wire: torch.dtype | None
) -> None:
    """From the largest to the smallest that float32 has, side by side, with a row of zeros among them."""
    W, x = (some(P, Q) / P**0.5).to(dtype), some(rows, P)
    ends = torch.logspace(-35, 35, rows, dtype=torch.float64).unsqueeze(1)
    x = (x * ends).index_fill(0, torch.tensor([1]), 0).to(dtype)
    product = offloaded(client, W, on_the_wire)
    y = product.finish_forward(product.start_forward(x))
    others = torch.arange(rows) != 1
    assert (errors(y, x.double() @ W.double())[others] < 16 * torch.finfo(on_the_wire or dtype).eps).all()
    assert not y[1].any()
