"""Every transform against its own dense matrix: products, inverses, sizes, dtypes, and where its secrets come from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obfuscatune import RootKey
from obfuscatune.enclave.obfuscation import Fingerprint, obfuscate
from obfuscatune.enclave.orthogonal import covering_grid, haar, inner_grid, kronecker_columns, kronecker_rows
from obfuscatune.enclave.tiles import transform_in_place
from obfuscatune.enclave.transforms import Transform, TransformSpec
from obfuscatune.errors import ConfigError, ProtectionError

KEY = RootKey(b"k" * 32)
SPECS = ("structured", "haar", "gaussian", "conditioned(32)", "identity")
ORTHOGONAL = ("structured", "haar", "identity")
# one, primes, near-square products, sizes about where the structured transform changes its form
DIMENSIONS = (1, 2, 3, 7, 47, 48, 64, 65, 67, 96, 97, 131, 172, 211)

specs = st.sampled_from(SPECS)
dimensions = st.one_of(st.sampled_from(DIMENSIONS), st.integers(1, 150))


def make(spec: str, dim: int, *parts: str | int) -> Transform:
    return TransformSpec.parse(spec).make(dim, KEY.stream("test", spec, dim, *parts))


def dense(transform: Transform) -> Tensor:
    """R (p, p)."""
    return transform.apply(torch.eye(transform.dim, dtype=torch.float64))


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return KEY.stream("rows", *shape).normal(*shape).to(dtype)


def slack(transform: Transform) -> float:
    """Rounding of 1e-16 over p terms, amplified by the condition number, with a margin of 100."""
    return 1e-14 * transform.dim * transform.condition_number


@settings(deadline=None, max_examples=60)
@given(specs, dimensions)
def test_products_agree_with_the_dense_matrix(spec: str, dim: int) -> None:
    transform, x = make(spec, dim), rows(3, dim)
    R = dense(transform)
    R_inverse = torch.linalg.inv(R)
    for found, expected in (
        (transform.apply(x), x @ R),
        (transform.apply_transpose(x), x @ R.T),
        (transform.inverse(x), x @ R_inverse),
        (transform.inverse_transpose(x), x @ R_inverse.T),
        (transform.weight_left(x.T), R_inverse @ x.T),
        (transform.weight_right(x), x @ R),
        (transform.inverse(transform.apply(x)), x),
        (transform.inverse_transpose(transform.apply_transpose(x)), x),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=slack(transform) * max(1, expected.abs().max().item()))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(ORTHOGONAL), dimensions)
def test_orthogonal_transforms_are(spec: str, dim: int) -> None:
    transform = make(spec, dim)
    R = dense(transform)
    torch.testing.assert_close(R @ R.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=slack(transform))
    assert transform.condition_number == 1.0


@pytest.mark.parametrize("dim", [2, 48, 67])
@pytest.mark.parametrize("spec", SPECS)
def test_condition_number_is_that_of_the_matrix(spec: str, dim: int) -> None:
    transform = make(spec, dim)
    assert transform.condition_number == pytest.approx(torch.linalg.cond(dense(transform)).item(), rel=1e-9)
    if spec == "conditioned(32)":
        assert transform.condition_number == 32
        assert torch.linalg.slogdet(dense(transform))[1].abs() < 1e-9  # neither shrinks nor grows on average


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(67,), (5, 67), (2, 3, 67), (2, 0, 67), (2, 1, 3, 67)])
@pytest.mark.parametrize("spec", SPECS)
def test_any_leading_shape_and_dtype(spec: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    transform, x = make(spec, 67), rows(*shape, dtype=dtype)
    R = dense(transform)
    precision = 4 * torch.finfo(dtype).eps  # one rounding of each result; 16-bit input is multiplied in float32
    for method, matrix in (("apply", R), ("apply_transpose", R.T)):
        found, expected = getattr(transform, method)(x), x.double() @ matrix
        assert (found.shape, found.dtype) == (x.shape, dtype)
        scale = expected.abs().max().item() if expected.numel() else 1.0
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=precision * scale * math.sqrt(67))


@pytest.mark.parametrize("spec", SPECS)
def test_strided_input_is_left_alone(spec: str) -> None:
    transform, x = make(spec, 67), rows(67, 5).T
    before = x.clone()
    transform.apply(x), transform.inverse(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(transform.apply(x), transform.apply(x.contiguous()), rtol=0, atol=1e-13)


PARAMETERS = {
    ("haar", 67): 67 * 66 // 2,
    ("gaussian", 67): 67 * 67,
    ("conditioned(32)", 67): 67 * 66,
    ("identity", 67): 0,
    ("structured", 48): 48 * 47 // 2 + 24 + 48,
    ("structured", 768): 24 * 23 // 2 + 32 * 31 // 2 + 384 + 768,
}


@pytest.mark.parametrize(("spec", "dim", "count"), [(*case, count) for case, count in PARAMETERS.items()])
def test_parameter_count(spec: str, dim: int, count: int) -> None:
    assert make(spec, dim).parameter_count == count


@pytest.mark.parametrize("dim", [65, 97, 131, 172, 768])
def test_structured_spreads_every_coordinate(dim: int) -> None:
    """No coordinate that the worker sees shows one feature alone, and no feature stays in few coordinates."""
    R = dense(make("structured", dim))
    assert R.abs().max() < 0.9
    mass = R.pow(2)
    participation = 1 / mass.pow(2).sum(dim=0)  # how many features share in each column: p for a flat one
    assert participation.min() > math.sqrt(dim) / 3
    assert (R != 0).double().mean() > 0.5


def test_no_feature_passes_both_grids_by() -> None:
    """66 of 67 lie in each grid: the one that is left over by the first is never left over by the second too."""
    for number in range(300):
        R = dense(make("structured", 67, number))
        assert (R != 0).sum(dim=0).min() > 1
        assert (R != 0).sum(dim=1).min() > 1


@pytest.mark.parametrize("spec", [name for name in SPECS if name != "identity"])
def test_secrets_follow_from_the_root_key_alone(spec: str) -> None:
    torch.manual_seed(0)
    first = dense(make(spec, 67, "a"))
    torch.manual_seed(1)
    assert torch.equal(first, dense(make(spec, 67, "a")))
    assert not torch.allclose(first, dense(make(spec, 67, "b")), atol=1e-3)
    assert torch.initial_seed() == 1


WEIGHT = rows(48, 67)
CHANGES: dict[str, dict[str, Any]] = {
    "another key": {"key": RootKey(b"l" * 32)},
    "another epoch": {"epoch": 1},
    "another layer": {"name": "layers.1.up_proj"},
    "another model": {"W": WEIGHT + 1e-3},
}


def obfuscated(**changes: Any) -> Any:
    spec = TransformSpec.parse("structured")
    standard: dict[str, Any] = {"W": WEIGHT, "key": KEY, "spec": spec, "name": "layers.0.up_proj", "epoch": 0}
    arguments = {**standard, **changes}
    return obfuscate(**{**arguments, "W": arguments["W"].clone()})  # W_star takes its place


def test_same_key_same_w_star() -> None:
    first, second = obfuscated(), obfuscated()
    assert torch.equal(first.W_star, second.W_star)
    torch.testing.assert_close(dense(first.R_in) @ first.W_star @ dense(first.R_out).T, WEIGHT, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("epoch", "limit"), [(0, 4e-7), (1, 5e-8)], ids=["at first", "re-keyed"])
def test_how_w_star_is_rounded(epoch: int, limit: float) -> None:
    """Root mean square: in float64, float32's 2.5e-8 for each side; in float32 that of sums over some ten terms, four
    times. What was re-keyed often has been rounded often."""
    W = rows(256, 768).float()
    found = obfuscated(W=W, epoch=epoch)
    exact = found.R_out.weight_right(found.R_in.weight_left(W.double()))
    assert (found.W_star - exact).norm() < limit * exact.norm()


@pytest.mark.parametrize(("p", "q"), [(256, 768), (400, 1600)])
def test_a_float32_product_hardly_tells_how_w_star_was_made(p: int, q: int) -> None:
    """Its error, from rotation to rotation back, root mean square, is at most a third larger than need be."""
    W, x = rows(p, q).float(), rows(64, p).float()
    exact = x.double() @ W.double()
    errors = []
    for wide in (torch.float32, torch.float64):
        R_in, R_out = make("structured", p), make("structured", q)
        W_star = transform_in_place(W.clone(), R_in, R_out, wide=wide)
        errors.append((R_out.inverse(R_in.apply(x) @ W_star) - exact).norm().item())
    in_float32, in_float64 = errors
    assert in_float32 < 4 / 3 * in_float64


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_anything_else_other_matrices(change: dict[str, Any]) -> None:
    first, second = obfuscated(), obfuscated(**change)
    for one, other in ((first.R_in, second.R_in), (first.R_out, second.R_out)):
        assert not torch.allclose(dense(one), dense(other), atol=1e-3)
    assert not torch.allclose(first.W_star, second.W_star, atol=1e-3)


def test_transforms_share_no_secret() -> None:
    """Q_a S Q_b with one Q_a and two S would have R Rᵀ with the same eigenvectors, which commute."""
    first, second = (dense(obfuscated(spec=TransformSpec.parse(f"conditioned({kappa})")).R_in) for kappa in (2, 8))
    one, other = first @ first.T, second @ second.T
    assert (one @ other - other @ one).abs().max() > 1e-3


def test_one_element_makes_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many: two W under the same secrets would show the worker in what they differ."""
    monkeypatch.setattr("obfuscatune.enclave.obfuscation._HASHED_AT_ONCE", 1 << 20)
    W = torch.zeros(1024, 1024)
    fingerprint = Fingerprint.of(W, KEY)
    assert fingerprint.is_of(W.clone())
    for place in (0, 1024 * 1024 // 2, 1024 * 1024 - 1):
        changed = W.clone()
        changed.view(-1)[place] = 1
        assert not fingerprint.is_of(changed)


@pytest.mark.parametrize(
    "other", [torch.zeros(8, 2), torch.zeros(2, 8), torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 5)], ids=str
)
def test_shape_and_dtype_make_another_model(other: Tensor) -> None:
    assert not Fingerprint.of(torch.zeros(4, 4), KEY).is_of(other)


def test_a_fingerprint_tells_nothing() -> None:
    """Its tag, seen, would let weights be guessed and held against it by whoever has the key; it is not shown."""
    fingerprint = Fingerprint.of(WEIGHT, KEY)
    assert fingerprint.tag.hex() not in repr(fingerprint)
    assert Fingerprint.of(WEIGHT, RootKey(b"l" * 32)).tag != fingerprint.tag


def test_the_two_sides_differ() -> None:
    square = obfuscated(W=rows(48, 48))
    assert not torch.allclose(dense(square.R_in), dense(square.R_out), atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_haar_is_haar(size: int) -> None:
    """Moments of Haar measure on O(p): E Q = 0, E q_ij² = 1/p, E q_ij⁴ = 3/(p(p+2)), and determinants of both signs."""
    stream, count = KEY.stream("haar", size), 2000
    Q = torch.stack([haar(stream, size) for _ in range(count)])
    error = 5 / math.sqrt(count)  # five standard deviations of a mean of numbers that are at most one
    assert Q.mean(dim=0).abs().max() < error
    assert (Q.pow(2).mean(dim=0) - 1 / size).abs().max() < error
    assert (Q.pow(4).mean(dim=0) - 3 / (size * (size + 2))).abs().max() < error
    assert torch.linalg.det(Q).sign().mean().abs() < error
    assert Q.diagonal(dim1=1, dim2=2).mean().abs() < error  # QR without mended signs fails here


@given(st.integers(1, 5000))
def test_grids(size: int) -> None:
    a, b = covering_grid(size)
    assert 1 <= a <= b and size <= a * b < size + a
    a, b = inner_grid(size)
    assert 1 <= a <= b and a * b <= size
    assert size - a * b < max(a, 1) or size == a * b
    assert 2 * (size - a * b) <= size  # both grids together cover everything


@given(st.integers(2, 9), st.integers(1, 9))  # a grid of one row is Q_b alone
def test_kronecker_products(a: int, b: int) -> None:
    Q_a, Q_b, x = rows(a, a), rows(b, b), rows(4, a * b)
    Q = torch.kron(Q_a, Q_b)
    torch.testing.assert_close(kronecker_columns(x, Q_a, Q_b), x @ Q, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kronecker_rows(Q_a, Q_b, x.T.contiguous()), Q @ x.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", ["Haar", "", "conditioned", "conditioned()", "conditioned(-1)", "conditioned(1e3)"])
def test_unknown_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="known are: structured, haar"):
        TransformSpec.parse(text)


@pytest.mark.parametrize("kappa", ["0", "0.5", "1000000000000"])
def test_condition_numbers_out_of_range_are_refused(kappa: str) -> None:
    with pytest.raises(ConfigError, match="kappa"):
        make(f"conditioned({kappa})", 4)


@pytest.mark.parametrize("spec", SPECS)
def test_specs_read_back(spec: str) -> None:
    assert str(TransformSpec.parse(spec)) == spec
    assert TransformSpec.parse(spec).is_unsafe == (spec == "identity")


@pytest.mark.parametrize("spec", SPECS)
def test_wrong_width_and_no_width(spec: str) -> None:
    with pytest.raises(ProtectionError, match="dimension 48"):
        make(spec, 48).apply(rows(3, 47))
    with pytest.raises(ProtectionError):
        make(spec, 0)


@pytest.mark.parametrize("spec", SPECS)
def test_repr_shows_no_secret(spec: str) -> None:
    assert "<redacted>" in repr(make(spec, 3)) and "." not in repr(make(spec, 3))
