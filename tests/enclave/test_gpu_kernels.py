"""The kernels for an enclave's part on a GPU compute what torch's operations do, to rounding.

In Triton's interpreter, on tensors of the CPU; compiled, where there is a GPU; and for one without running them, where
Triton is installed. Where tensors are put is watched by torch's fake CUDA tensors, which refuse two devices in one
operation.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from obfuscatune import RootKey, protect
from obfuscatune.enclave import kernels
from obfuscatune.enclave.kernels import REFERENCE, Kernels
from obfuscatune.enclave.kernels.interface import Rotation
from obfuscatune.enclave.mixing import KroneckerMixer, KroneckerMixing, RowScales
from obfuscatune.enclave.product import ManyRows
from obfuscatune.enclave.transforms.structured import StructuredTransform
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import backward, batch, copy_of, largest_deviation, with_lora

KEY = RootKey(b"k" * 32)
MODULES = ("obfuscatune.enclave.kernels.gpu_programs", "obfuscatune.enclave.kernels.gpu")
DTYPES = (torch.float32, torch.float64)
without_triton = importlib.util.find_spec("triton") is None
needs_triton = pytest.mark.skipif(without_triton, reason="triton is not installed (the extra `triton`)")
on_gpu = pytest.mark.skipif(
    without_triton or not torch.cuda.is_available(), reason="no CUDA device on this machine that this torch can use"
)
few_of_a_fixture = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def some(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return KEY.stream("x", *shape).normal(*shape).to(dtype)


def rotation(dim: int, dtype: torch.dtype, *, undo: bool, device: str = "cpu") -> Rotation:
    R = StructuredTransform(dim, KEY.stream("transform", dim))
    return R._rotation(dtype, torch.device(device), undo=undo)


@contextmanager
def loaded(*, interpret: bool) -> Iterator[Any]:
    """The module of the kernels, made for Triton's interpreter or for its compiler: it asks when it is imported."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        module = importlib.import_module(MODULES[1])
        if interpret:
            patch.setattr(module, "_on", lambda x: nullcontext())
        yield module
    for name, found in before.items():
        sys.modules.pop(name, None)
        if found is not None:
            sys.modules[name] = found


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Kernels]:
    """The kernels, run by Triton's interpreter on the CPU."""
    if without_triton:
        pytest.skip("triton is not installed (the extra `triton`)")
    with loaded(interpret=True) as module:
        yield module.Gpu()


def error(found: Tensor, exact: Tensor) -> float:
    """Of the largest to the root mean square, in roundings of the dtype."""
    return float((found.double() - exact).abs().max() / exact.square().mean().sqrt()) / torch.finfo(found.dtype).eps


@given(
    dim=st.sampled_from([33, 48, 65, 96, 97, 130, 600]),
    rows=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    undo=st.booleans(),
    biased=st.booleans(),
    gap=st.integers(0, 3),
)
@few_of_a_fixture
def test_rotation(
    interpreted: Kernels, dim: int, rows: int, dtype: torch.dtype, undo: bool, biased: bool, gap: int
) -> None:
    x, bias = some(rows, dim + gap, dtype=dtype)[:, :dim], some(dim, dtype=dtype) if biased else None
    exact = REFERENCE.rotate(
        x.double(), rotation(dim, torch.float64, undo=undo), plus=None if bias is None else bias.double()
    )
    R = rotation(dim, dtype, undo=undo)
    assert error(interpreted.rotate(x, R, plus=bias), exact) < 24
    own = x.clone()
    assert interpreted.rotate(own, R, plus=bias, out=own) is own
    assert error(own, exact) < 24


@given(
    rows=st.integers(33, 140), width=st.integers(1, 70), shield=st.integers(0, 12), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@few_of_a_fixture
def test_mixing_and_back(interpreted: Kernels, rows: int, width: int, shield: int, dtype: torch.dtype) -> None:
    mixing = KroneckerMixer(shield, KEY.stream("mixing", rows, shield)).draw(rows, width)
    assert isinstance(mixing, KroneckerMixing)
    x, N = some(rows, width + 2, dtype=dtype)[:, 1:-1], some(mixing.rows - rows, width)
    exact = torch.empty(mixing.rows, width, dtype=torch.float64)
    REFERENCE.mix(x.double(), N, mixing._A, exact)
    interpreted.mix(x, N, mixing._A, out := torch.empty(mixing.rows, width, dtype=dtype))
    assert error(out, exact) < 24
    back, finite = interpreted.unmix(out, mixing._A)
    assert finite
    assert error(back, REFERENCE.unmix(out.double(), mixing._A)[0]) < 24


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter's numpy
def test_what_is_not_finite_is_seen(interpreted: Kernels) -> None:
    A = KroneckerMixer(8, KEY.stream("m")).draw(40, 20)._A  # type: ignore[attr-defined]
    for bad in (np.nan, np.inf, -np.inf):
        y = some(A.order.numel(), 20, dtype=torch.float32)
        y[7, 3] = bad
        assert not interpreted.unmix(y, A)[1]


@pytest.mark.parametrize(
    ("profile", "lengths"),
    [
        ("private", (17,)),  # more than native kernels take as few, on any processor
        pytest.param("private", (20, 13), marks=pytest.mark.long),
        pytest.param("guarded", (20, 13), marks=pytest.mark.long),
    ],
)
def test_a_model_by_these_kernels(
    interpreted: Kernels, monkeypatch: pytest.MonkeyPatch, profile: str, lengths: tuple[int, ...]
) -> None:
    """Forward and backward, with whatever falls back: gradients as of the plain model, to the rounding of float32."""
    called = set()

    def kernels_for(x: Tensor) -> Kernels:
        called.add(x.shape[1])
        return interpreted

    architecture, inputs = ARCHITECTURES["gpt2"], batch(lengths, 97)
    plain = architecture.build(torch.float32, n_embd=96, n_layer=1)
    _, expected = backward(with_lora(copy_of(plain), architecture), inputs)
    more = {"mask_worker": "device:cpu:1"} if profile == "guarded" else {}
    with protect(plain, "device:cpu", profile, first_blocks=0, **more) as model:
        monkeypatch.setattr(kernels, "kernels_for", kernels_for)
        _, found = backward(with_lora(model, architecture), inputs)
    assert called >= {96, 288, 67}
    assert largest_deviation(expected, found) < 6e-5


class WithoutValues(TorchFunctionMode):
    """What fake tensors cannot do, for they have no values: to be looked at. And what this torch cannot: be sliced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__:
            return True
        if func in (Tensor.__float__, Tensor.item):
            return 1.0
        if func is Tensor.numpy:
            return np.ones(tuple(args[0].shape))
        if func is Tensor.__getitem__ and not isinstance(args[1], Tensor):
            x = args[0]
            for axis, part in enumerate(args[1] if isinstance(args[1], tuple) else (args[1],)):
                start, stop, _ = part.indices(x.shape[axis])
                x = x.narrow(axis, start, stop - start)
            return x
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [3, 40], ids=["few rows", "many rows"])
@pytest.mark.parametrize("dim", [48, 96, 97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_put_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, rows: int, dim: int, dtype: torch.dtype
) -> None:
    """The whole way of rows that lie on a GPU: no operation meets tensors of two devices."""
    monkeypatch.setattr(kernels, "gpu_for", lambda x: None)
    R_in, R_out = (StructuredTransform(dim, KEY.stream("transform", side)) for side in ("in", "out"))
    mixing = KroneckerMixer(8, KEY.stream("m")).draw(rows, dim)
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutValues():
        x, bias = torch.empty(rows, dim, dtype=dtype, device="cuda"), torch.empty(dim, dtype=dtype, device="cuda")

        def turn_back(y: Tensor, plus: Tensor | None, dtype: torch.dtype) -> Tensor:
            return R_out.inverse_plus(y, bias.to(y.dtype)).to(dtype)

        passage = ManyRows(x, R_in.apply, turn_back, mixing)
        assert isinstance(passage.mixing._scales, RowScales)  # type: ignore[union-attr]
        X_star = torch.empty(mixing.rows, dim, dtype=dtype)
        passage.lay_down(X_star)
        assert passage.image(torch.empty(dim, 8, dtype=torch.float64)).shape == (mixing.rows, 8)
        y, _ = passage.take_up(torch.empty(mixing.rows, dim, dtype=dtype), bias, 0.5)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, dtype, "cuda")


@needs_triton
@pytest.mark.long
def test_the_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    """For Hopper and Ampere, each kernel in both dtypes, to machine code."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows = {"A": 32, "B": 32, "R": 2, "HAS_BIAS": True}
    columns = {"A": 16, "B": 32, "C": 4}
    with loaded(interpret=False) as module:
        kernels_and_sizes = ((module.rotate_rows, rows), (module.mix_columns, columns), (module.unmix_columns, columns))
        for (kernel, sizes), element, capability in product(kernels_and_sizes, ("fp32", "fp64"), (80, 90)):
            types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(sizes, "constexpr")
            pointers = {"x", "y", "Q_a", "Q_b", "bias", "shield", "out"} & set(kernel.arg_names)
            types |= dict.fromkeys(pointers, f"*{element}")
            types |= dict.fromkeys({"picked", "placed", "order"} & set(kernel.arg_names), "*i32")
            source = ASTSource(fn=kernel, signature=types, constexprs=sizes)
            code = compiled(source, target=GPUTarget("cuda", capability, 32), options=dict(module.OPTIONS))
            assert code.asm["cubin"]


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [96, 97, 768, 1600, 2048, 6400, 8192])
def test_compiled_on_a_gpu(dtype: torch.dtype, dim: int) -> None:
    by_kernel = kernels.kernels_for(torch.empty(2, 2, dtype=dtype, device="cuda"))
    assert by_kernel is not REFERENCE
    for rows in (1, 33, 520):
        x, bias = some(rows, dim, dtype=dtype), some(dim, dtype=dtype)
        for undo in (False, True):
            exact = REFERENCE.rotate(x.double(), rotation(dim, torch.float64, undo=undo), plus=bias.double())
            R = rotation(dim, dtype, undo=undo, device="cuda:0")
            assert error(by_kernel.rotate(x.cuda(), R, plus=bias.cuda()).cpu(), exact) < 64
        if rows > 32:
            A = KroneckerMixer(8, KEY.stream("m", rows)).draw(rows, dim)._A  # type: ignore[attr-defined]
            N, exact = some(A.order.numel() - rows, dim), torch.empty(A.order.numel(), dim, dtype=torch.float64)
            REFERENCE.mix(x.double(), N, A, exact)
            by_kernel.mix(x.cuda(), N, A, out := torch.empty(exact.shape, dtype=dtype, device="cuda"))
            assert error(out.cpu(), exact) < 64
            back, finite = by_kernel.unmix(out, A)
            assert finite
            assert error(back.cpu(), REFERENCE.unmix(out.cpu().double(), A)[0]) < 64
