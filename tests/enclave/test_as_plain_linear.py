"""A protected layer is an `nn.Linear` in every way that others rely on; the worker behind it is a real one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from obfuscatune import protect
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ProtectionError

WIDTHS = {"narrow": 6, "pairs": 96, "odd": 83}
"""Widths that are rotated in three ways: by one dense matrix, by a grid with pairs permuted, by two grids."""
NAMES = ("q_proj", "k_proj", "v_proj", "c_fc")
# Per element, relative to the largest; a sum of 96 products is rounded some ten times on its way through the worker.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2}


class Block(nn.Module):
    """Three layers that share an input, with and without bias, and one of GPT-2's kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, 10), nn.Linear(width, 8)
        self.k_proj = nn.Linear(width, 12, bias=False)
        self.c_fc = Conv1D(14, width)


class Model(nn.Module):
    """Blocks of all widths."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width) for width in WIDTHS.values()])


def build(dtype: torch.dtype) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Model()
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    return model.to(dtype).requires_grad_(False)


@pytest.fixture(scope="module")
def models(worker: LocalWorker) -> Iterator[dict[torch.dtype, tuple[Any, Any]]]:
    """Plain and protected, for each dtype."""
    both: dict[torch.dtype, tuple[Any, Any]] = {}
    for dtype in TOLERANCE:
        both[dtype] = build(dtype), protect(build(dtype), worker.address, first_blocks=0)
    yield both
    for _, protected in both.values():
        protected.protection.close()


def layers(models: dict[torch.dtype, tuple[Any, Any]], dtype: torch.dtype, width: str, name: str) -> tuple[Any, Any]:
    index = list(WIDTHS).index(width)
    plain, protected = (getattr(model.layers[index], name) for model in models[dtype])
    return plain, protected


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "offset": lambda x: torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape),
    "padded rows": lambda x: torch.nn.functional.pad(x, (0, 5))[..., : x.shape[-1]],
    "every other column": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda x: x[..., :1, :].expand(x.shape) if x.dim() > 1 and x.shape[-2] else x,
    "one value": lambda x: x.reshape(-1)[:1].expand(x.shape) if x.numel() else x,
    "reversed": lambda x: x.flip(-1),
    "negated lazily": lambda x: torch._neg_view(x),
}
AFTERWARDS = {
    "nothing": lambda y: y * 1,
    "clamp_": lambda y: y.clamp_(-1.5, 1.5),
    "add_ to a part": lambda y: (y[..., :2].add_(1), y)[1],
    "assign": lambda y: (y.__setitem__((..., 0), 3.0), y)[1],
    "flat": lambda y: y.view(-1),
    "mul_ and add_": lambda y: y.mul_(2).add_(1),
}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
SHAPES = st.sampled_from([(), (0,), (1,), (2,), (5,), (40,), (2, 3), (3, 1), (0, 4), (2, 2, 3)])


def deviation(expected: Tensor, found: Tensor, size: float = 1e-30) -> float:
    """Largest difference, relative to the largest value or to `size`, where that is more."""
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    if not expected.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(size)
    return difference.item()


def _row_norm(x: Tensor) -> float:
    return max(torch.linalg.vector_norm(x.double(), dim=-1).max().item(), 1e-30) if x.numel() else 1.0


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    width=st.sampled_from(list(WIDTHS)),
    name=st.sampled_from(NAMES),
    shape=SHAPES,
    layout=st.sampled_from(list(LAYOUTS)),
    afterwards=st.sampled_from(list(AFTERWARDS)),
    mode=st.sampled_from(list(MODES)),
    needs_grad=st.booleans(),
    hook=st.sampled_from(["none", "forward", "forward pre", "full backward", "full backward pre"]),
    autocast=st.booleans(),
    seed=st.integers(0, 9),
)
def test_it_computes_as_the_plain_layer_does(
    models: dict[torch.dtype, tuple[Any, Any]],
    dtype: torch.dtype,
    width: str,
    name: str,
    shape: tuple[int, ...],
    layout: str,
    afterwards: str,
    mode: str,
    needs_grad: bool,
    hook: str,
    autocast: bool,
    seed: int,
) -> None:
    """The same shape, dtype, values, gradients and grad mode; and what may be done to the output may be done."""
    generator = torch.Generator().manual_seed(seed)
    x = LAYOUTS[layout](torch.randn(*shape, WIDTHS[width], dtype=torch.float64, generator=generator).to(dtype))
    outcomes = []
    for layer in layers(models, dtype, width, name):
        seen: list[Any] = []
        own = x.detach()
        if type(layer) is Conv1D:
            own = own.contiguous()  # the plain one takes no other
        handle = {
            "none": lambda: None,
            "forward": lambda: layer.register_forward_hook(lambda m, i, o: seen.append(o.shape) or o * 2),  # noqa: B023
            "forward pre": lambda: layer.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),  # noqa: B023
            "full backward": lambda: layer.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].shape)),  # noqa: B023
            "full backward pre": lambda: layer.register_full_backward_pre_hook(lambda m, go: (go[0] * 2,)),  # noqa: B023
        }[hook]()
        context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        try:
            with MODES[mode](), context:
                if needs_grad and mode == "grad":
                    own = own.requires_grad_()
                y = layer(own)
                if not (hook.startswith("full backward") and y.requires_grad):  # a view, of the plain layer as well
                    y = AFTERWARDS[afterwards](y)
            gradient = None
            if y.requires_grad:
                (gradient,) = torch.autograd.grad(y, own, torch.ones_like(y))
            outcomes.append((y.detach(), gradient, y.requires_grad, y.is_inference(), seen))
        finally:
            if handle is not None:
                handle.remove()
    (expected, expected_gradient, *expected_else), (found, found_gradient, *found_else) = outcomes
    assert found_else == expected_else
    reached = torch.bfloat16 if autocast and dtype != torch.float64 else dtype
    # Weights have unit variance, so an element of the product is about as large as its row, unless it cancels.
    assert deviation(expected, found, _row_norm(x)) < TOLERANCE[reached]
    assert (found_gradient is None) == (expected_gradient is None)
    near_the_bound = afterwards == "clamp_" and reached != torch.float64  # there rounding decides over a gradient
    if expected_gradient is not None and not near_the_bound:
        assert deviation(expected_gradient, found_gradient, _row_norm(expected)) < TOLERANCE[reached]


@pytest.mark.parametrize("within", [False, True], ids=["backward outside", "backward within"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_errs_as_plain_autocast_does(
    models: dict[torch.dtype, tuple[Any, Any]], dtype: torch.dtype, within: bool
) -> None:
    """Against float64, forward and backward; and no worker is accused, however the gradient comes back."""
    exact = build(dtype).double().layers[1].q_proj  # type: ignore[union-attr, index]
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    errors = []
    for layer in layers(models, dtype, "pairs", "q_proj"):
        own, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(own)
            assert y.dtype == torch.bfloat16
            if within:
                y.float().sum().backward()
        if not within:
            y.float().sum().backward()
        exact(wide).sum().backward()
        assert own.grad is not None and own.grad.dtype == dtype
        errors.append((deviation(exact(wide), y.double()), deviation(wide.grad, own.grad.double())))  # type: ignore[arg-type]
    # W lies on the worker in the model's dtype: in bfloat16 its rotated form is rounded, as its products are.
    times = 1.25 if dtype == torch.float32 else 4
    for plain, protected in zip(*errors, strict=True):
        assert protected <= times * plain


def test_in_place_on_one_sibling_leaves_the_others(models: dict[torch.dtype, tuple[Any, Any]]) -> None:
    """As OLMo clips q, k and v; their backward passes need what was saved before."""
    gradients = []
    for which in (0, 1):
        block = models[torch.float64][which].layers[1]
        x = torch.randn(7, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        q, k, v = block.q_proj(x), block.k_proj(x), block.v_proj(x)
        saved = v.exp()
        loss = q.clamp_(-1, 1).sum() + (k.clamp_(-1, 1) ** 2).sum() + saved.tanh().sum()
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert deviation(*gradients) < 1e-12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "x",
    [torch.ones(3, 95), torch.ones(3, 96).double(), torch.ones(3, 96).long(), torch.ones(3, 96).bool(), torch.ones(())],
    ids=["too narrow", "float64", "int64", "bool", "no dimension"],
)
def test_what_plain_refuses_is_refused_alike(models: dict[torch.dtype, tuple[Any, Any]], name: str, x: Tensor) -> None:
    plain, protected = layers(models, torch.float32, "pairs", name)
    before = models[torch.float32][1].protection.stats.bytes_sent
    with pytest.raises((RuntimeError, IndexError)):
        plain(x)
    with pytest.raises(RuntimeError):
        protected(x)
    assert models[torch.float32][1].protection.stats.bytes_sent == before


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, at first use
def test_transforms_of_functions_are_refused(models: dict[torch.dtype, tuple[Any, Any]]) -> None:
    _, layer = layers(models, torch.float32, "pairs", "q_proj")
    x = torch.ones(3, 96)
    with pytest.raises(ProtectionError, match=r"torch\.func"):
        torch.vmap(layer)(x)
    with pytest.raises(ProtectionError, match=r"torch\.func"):
        torch.func.grad(lambda x: layer(x).sum())(x)
    with pytest.raises(ProtectionError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(x, x))


def test_keywords_are_those_of_the_plain_layer(models: dict[torch.dtype, tuple[Any, Any]]) -> None:
    for name, keyword in (("q_proj", "input"), ("c_fc", "x")):
        plain, protected = layers(models, torch.float64, "pairs", name)
        x = torch.ones(2, 96, dtype=torch.float64)
        assert deviation(plain(**{keyword: x}), protected(**{keyword: x})) < 1e-12


def test_four_threads_use_one_model(models: dict[torch.dtype, tuple[Any, Any]]) -> None:
    """Siblings, backward passes, few rows and many, at the same time; even with the same tensor."""
    plain, protected = models[torch.float64]
    shared = torch.randn(5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    worst: list[float] = []
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def use(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            start.wait(60)
            for turn in range(12):
                own = torch.randn((2, 70)[turn % 2], 96, dtype=torch.float64, generator=generator)
                for x in (own.requires_grad_(), shared):
                    for name in ("v_proj", "q_proj", "k_proj"):
                        expected, found = (getattr(m.layers[1], name)(x) for m in (plain, protected))
                        worst.append(deviation(expected.detach(), found.detach()))
                        if x.requires_grad:
                            sides = [torch.autograd.grad(y.sum(), x)[0] for y in (expected, found)]
                            worst.append(deviation(*sides))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(worst) == 4 * 12 * 9 and max(worst) < 1e-12
