"""Freivalds' check: honest products pass, tampered ones are caught as often as the bound says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from obfuscatune import RootKey
from obfuscatune.enclave.mixing import KroneckerMixer, NoMixer
from obfuscatune.enclave.transforms.structured import StructuredTransform
from obfuscatune.enclave.verification import MARGIN, VECTORS, Probe, Verifier, norm_of
from obfuscatune.errors import BadReply, WrongProduct

KEY = RootKey(b"v" * 32)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Request:
    """One mixed request, its honest product, and as many probes of it as asked for."""

    def __init__(self, n: int, p: int, q: int, dtype: torch.dtype, *, transpose: bool = False) -> None:
        stream = KEY.stream("request", n, p, q, str(dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        W = stream.normal(p, q).mul(0.05).to(dtype)
        self._verifier = Verifier(W, stream, 1.0)
        self._transpose = transpose
        self._x = stream.normal(n, q if transpose else p).to(wide)
        self._x[:, 0] *= 30  # as outlier features are
        self._mixing = KroneckerMixer(8, stream).draw(n, q if transpose else p)
        self._x = self._mixing.scaled(self._x)
        self._mixing.mix(self._x, rows := self._x.new_empty(self._mixing.rows, self._x.shape[1]))
        self.scale = self._mixing.size
        self.product = (rows.to(dtype) @ (W.T if transpose else W)).to(wide)
        self.dtype = dtype

    def probe(self) -> tuple[Probe, Tensor]:
        probe = self._verifier.probe(transpose=self._transpose)
        return probe, self._mixing.image(self._x, probe.V)

    def excess(self, product: Tensor) -> float:
        probe, U = self.probe()
        return float(probe.excess(product, U, self.scale, self.dtype))

    def check(self, product: Tensor) -> None:
        probe, U = self.probe()
        probe.check(product, U, self.scale, self.dtype)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("size", [(1, 64, 96), (40, 96, 64), (200, 300, 128)])
def test_honest_products_pass_with_room_to_spare(name: str, transpose: bool, size: tuple[int, int, int]) -> None:
    request = Request(*size, DTYPES[name], transpose=transpose)
    request.check(request.product)
    assert max(request.excess(request.product) for _ in range(20)) < 0.7


@pytest.mark.parametrize("size", [(200, 3072, 64), (200, 64, 3072), (200, 6400, 64), (20, 6400, 64)])
def test_sums_as_long_as_layers_are_wide_leave_as_much_room(size: tuple[int, int, int]) -> None:
    """What honest products are off by must not grow with the width: summed in float32, ours did, and alarmed."""
    request = Request(*size, torch.float32)
    assert max(request.excess(request.product) for _ in range(100)) < 0.45


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("value", [1e18, 1e19, 2e19, 3e38])
def test_no_product_raises_its_tolerance_above_what_the_enclave_knew(name: str, value: float) -> None:
    """The bound in docs/verification.md; an honest product stays far below it."""
    request = Request(40, 96, 64, DTYPES[name])
    probe, _ = request.probe()
    (m, p), expected = (request.product.shape[0], 96), request.scale * probe.norm
    bound = MARGIN[request.dtype] * torch.finfo(request.dtype).eps / 2 * expected * (1 + 4 * math.sqrt(m * p))
    honest = probe.tolerance(request.product, request.scale, request.dtype)
    assert honest.max() < bound / 10
    for rows in (1, m):
        hostile = torch.zeros_like(request.product)
        hostile[:rows, 0] = value
        tau = probe.tolerance(hostile, request.scale, request.dtype)
        assert tau.isfinite().all()
        assert tau.max() <= bound * (1 + 1e-6)
        assert request.excess(hostile) > 1e3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["along it", "random", "ones"])
def test_matrices_of_rank_one_leave_as_much_room_and_stay_within_the_bound(kind: str, dtype: torch.dtype) -> None:
    """Where rows lie along the only direction that a matrix has, its product is as large as can be: |x| |W|."""
    p, n, stream = 2048, 64, KEY.stream("rank one", kind)
    u, v = (torch.ones(p) if kind == "ones" else stream.normal(p).float() for _ in range(2))
    along = u * stream.normal(n, 1).float()
    x = stream.normal(n, p).float() if kind == "random" else along
    turn = StructuredTransform(p, KEY.stream("turn")), StructuredTransform(p, KEY.stream("turn back"))
    W = turn[1].weight_right(turn[0].weight_left(torch.outer(u, v) / p)).to(dtype)
    verifier, mixing = Verifier(W, stream, 1.0), KroneckerMixer(16, stream).draw(n, p)
    rotated = turn[0].apply(mixing.scaled(x))
    mixing.mix(rotated, rows := rotated.new_empty(mixing.rows, p))
    product = (rows.to(dtype).float() @ W.float()).to(dtype).float()
    probes = [verifier.probe(transpose=False) for _ in range(50)]
    images = (mixing.image(rotated, probe.V) for probe in probes)
    each = zip(probes, images, strict=True)
    assert max(float(probe.excess(product, image, mixing.size, dtype)) for probe, image in each) < 0.45
    unmixed = mixing.unmix(product)
    verifier.bound(norm_of(unmixed), unmixed.numel(), mixing.rows, mixing.size, dtype, transpose=False)
    with pytest.raises(WrongProduct, match=r"^the compute worker.*times as large as.* The compute worker is hostile"):
        verifier.bound(
            norm_of(10 * unmixed + 100), unmixed.numel(), mixing.rows, mixing.size, dtype, transpose=False,
            party="compute worker",
        )  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_for_an_honest_product_the_bound_changes_nothing(name: str) -> None:
    """No looser and no tighter: what small changes are caught is as it was without it."""
    request = Request(40, 96, 64, DTYPES[name])
    probe, _ = request.probe()
    norms = request.product.double().norm(dim=1)
    size = request.scale * probe.norm + norms + norms.square().mean().sqrt()
    expected = MARGIN[request.dtype] * torch.finfo(request.dtype).eps / 2 * size
    torch.testing.assert_close(probe.tolerance(request.product, request.scale, request.dtype), expected)


def test_a_tolerance_that_is_not_finite_tolerates_nothing() -> None:
    request = Request(40, 96, 64, torch.float32)
    probe, U = request.probe()
    for scale in (math.inf, math.nan):
        with pytest.raises(WrongProduct):
            probe.check(request.product, U, scale, torch.float32)


def one_element(product: Tensor, size: float) -> Tensor:
    changed = product.clone()
    changed[3, 5] += size
    return changed


def two_that_cancel(product: Tensor, size: float) -> Tensor:
    """What vectors of +1 and -1 would overlook half of the time."""
    changed = one_element(product, size)
    changed[3, 6] -= size
    return changed


def one_row(product: Tensor, size: float) -> Tensor:
    changed = product.clone()
    changed[3] += size * KEY.stream("row").normal(product.shape[1]).to(product)
    return changed


def noise(product: Tensor, size: float) -> Tensor:
    return product + size * KEY.stream("noise").normal(*product.shape).to(product)


@pytest.mark.parametrize("tampering", [one_element, two_that_cancel, one_row, noise])
@pytest.mark.parametrize(("name", "size"), [("float32", 0.01), ("bfloat16", 20.0)])
def test_what_is_caught(tampering: object, name: str, size: float) -> None:
    """Changes of `size` times the root mean square, at the stated probability over 300 trials."""
    request = Request(40, 96, 64, DTYPES[name])
    rms = float(request.product.square().mean().sqrt())
    changed = tampering(request.product, size * rms)  # type: ignore[operator]
    probe, _ = request.probe()
    tau = probe.tolerance(changed, request.scale, request.dtype)[3]
    overlooked = min(1.0, float(0.8 * tau / (changed - request.product)[3].norm())) ** VECTORS[request.dtype]
    missed = sum(request.excess(changed) <= 1 for _ in range(300)) / 300
    assert missed <= overlooked + 3 * math.sqrt(overlooked / 300) + 0.01


def test_what_rounding_hides_is_not_caught() -> None:
    """The other side of the table: the check does not claim what it cannot do."""
    request = Request(40, 96, 64, torch.float32)
    rms = float(request.product.square().mean().sqrt())
    assert sum(request.excess(one_element(request.product, 1e-6 * rms)) > 1 for _ in range(50)) == 0


def test_a_wrong_product_says_so() -> None:
    request = Request(40, 96, 64, torch.float32)
    with pytest.raises(WrongProduct, match="times what rounding explains"):
        request.check(request.product.roll(1, dims=0))
    with pytest.raises(BadReply):
        request.check(torch.full_like(request.product, torch.nan))


def test_vectors_are_fresh_and_some_requests_are_spared() -> None:
    W = torch.randn(20, 30)
    verifier = Verifier(W, KEY.stream("share"), 0.25)
    x = torch.randn(3, 20)
    drawn = [verifier.check_for(lambda V: x.double() @ V, 1.0, x.dtype, transpose=False) for _ in range(400)]
    assert 60 < sum(check(x @ W) for check in drawn) < 140
    probes = [verifier.probe(transpose=False) for _ in range(100)]
    assert not torch.allclose(*(probe.c for probe in probes[:2]), atol=0.1)
    for probe in probes:
        torch.testing.assert_close(probe.c.T @ probe.c, torch.eye(VECTORS[W.dtype]).double(), rtol=0, atol=1e-12)
    r = torch.stack([probe.R @ probe.c for probe in probes])
    torch.testing.assert_close(r.std(), torch.tensor(1.0).double(), atol=0.2, rtol=0)


@pytest.mark.parametrize("transpose", [False, True])
def test_renewed_vectors_are_others_of_the_same_matrix(transpose: bool) -> None:
    W = torch.randn(20, 30)
    verifier = Verifier(W, KEY.stream("renewed"), 1.0)
    x = torch.randn(3, 30 if transpose else 20)
    product = x @ (W.T if transpose else W)
    under_way = verifier.check_for(lambda V: x.double() @ V, 1.0, x.dtype, transpose=transpose)
    before = verifier.probe(transpose=transpose)
    verifier.renew(W)
    after = verifier.probe(transpose=transpose)
    assert abs(torch.nn.functional.cosine_similarity(before.R, after.R, dim=0)).max() < 0.9
    torch.testing.assert_close(after.V, (W.T if transpose else W).double() @ after.R, rtol=0, atol=1e-4)
    fresh = verifier.check_for(lambda V: x.double() @ V, 1.0, x.dtype, transpose=transpose)
    for check in (under_way, fresh):
        assert check(product)
        with pytest.raises(WrongProduct):
            check(product + 0.1)


def test_without_mixing_the_image_is_that_of_the_rows() -> None:
    x, v = torch.randn(3, 5), torch.randn(5, 2)
    torch.testing.assert_close(NoMixer().draw(3, 5).image(x, v), (x @ v).double())
