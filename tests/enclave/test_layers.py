"""The layers that take the plain ones' place: one crossing for all that share an input, and no weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from obfuscatune import protect
from obfuscatune.enclave.layers import ProtectedConv1D, ProtectedLinear
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import NonFiniteError, ProtectionError


class Block(nn.Module):
    """Three layers that may share an input, with and without bias, and one of GPT-2's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 5), nn.Linear(6, 3, bias=False), nn.Linear(6, 4)
        self.c_fc = Conv1D(7, 6)


class Model(nn.Module):
    """The least that counts as a model of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()])


@pytest.fixture(scope="module")
def plain() -> Block:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        block: Any = Model().double().layers[0]
    nn.init.normal_(block.c_fc.bias, generator=torch.Generator().manual_seed(1))
    return block


@pytest.fixture
def model(plain: Block, worker: LocalWorker) -> Iterator[Any]:
    wrapper = Model()
    wrapper.layers[0] = copy.deepcopy(plain)
    protect(wrapper, worker.address, first_blocks=0)
    yield wrapper
    wrapper.protection.close()  # type: ignore[operator, union-attr]


@pytest.fixture
def block(model: Any) -> Any:
    return model.layers[0]


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=1e-12)


def crossings(model: Any) -> int:
    return model.protection.stats.crossings


@pytest.mark.parametrize("shape", [(6,), (1, 6), (9, 6), (2, 3, 6), (0, 6), (2, 0, 6)])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "c_fc"])
def test_any_leading_shape(block: Any, plain: Block, name: str, shape: tuple[int, ...]) -> None:
    x = some(*shape).requires_grad_()
    found, expected = getattr(block, name)(x), getattr(plain, name)(x)
    assert found.shape == expected.shape
    assert same(found, expected)
    g = some(*expected.shape)
    assert same(torch.autograd.grad(found, x, g)[0], torch.autograd.grad(expected, x, g)[0])


def test_siblings_cross_once(model: Any, block: Any, plain: Block) -> None:
    x = some(4, 6)
    for name in ("v_proj", "q_proj", "k_proj"):  # in any order
        assert same(getattr(block, name)(x), getattr(plain, name)(x))
    assert crossings(model) == 1
    assert block.q_proj._crossing._visit is None  # nothing is held on to


def test_backward_crosses_once_too(model: Any, block: Any, plain: Block) -> None:
    x = some(4, 6).requires_grad_()
    layers = [(getattr(block, name), getattr(plain, name)) for name in ("q_proj", "k_proj", "v_proj")]
    found = sum(layer(x).pow(2).sum() for layer, _ in layers)
    expected = sum(layer(x).pow(2).sum() for _, layer in layers)
    assert same(torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, x)[0])
    assert crossings(model) == 2


def test_only_some_siblings_are_used(model: Any, block: Any, plain: Block) -> None:
    """Those that nobody asked for get no gradient, and what was held for them serves no other input."""
    for seed in range(2):
        x = (some(4, 6) + seed).requires_grad_()
        found, expected = block.k_proj(x), plain.k_proj(x)
        assert same(found, expected)
        assert same(torch.autograd.grad(found.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    assert crossings(model) == 4


Change = Callable[[Tensor], Tensor]
OTHERS: dict[str, Change] = {
    "another tensor": lambda x: x + 1,
    "an equal copy": lambda x: x.clone(),
    "changed in place": lambda x: x.add_(1),
    "a view of it": lambda x: x[:2],
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_sibling_with_another_input_is_right(block: Any, plain: Block, change: Change, context: Any) -> None:
    with context():
        x = some(4, 6).clone()
        assert same(block.q_proj(x), plain.q_proj(x))
        other = change(x)
        assert same(block.k_proj(other), plain.k_proj(other))
        assert same(block.v_proj(other), plain.v_proj(other))


def test_called_again_with_the_same_input(model: Any, block: Any, plain: Block) -> None:
    x = some(4, 6)
    for _ in range(2):
        assert same(block.q_proj(x), plain.q_proj(x))
    assert crossings(model) == 2


def test_what_was_computed_without_gradients_is_not_served_with_them(block: Any, plain: Block) -> None:
    x = some(4, 6).requires_grad_()
    with torch.no_grad():
        block.q_proj(x)
    assert block.k_proj(x).requires_grad
    assert same(torch.autograd.grad(block.v_proj(x).sum(), x)[0], plain.v_proj.weight.sum(0).expand(4, 6))


def test_biases_are_trained_here(block: Any, plain: Block) -> None:
    assert not any(parameter.requires_grad for parameter in block.parameters())  # until somebody asks for it
    block.q_proj.bias.requires_grad_()
    block.q_proj(some(4, 6)).sum().backward()
    assert same(block.q_proj.bias.grad, torch.full((5,), 4.0, dtype=torch.float64))
    assert block.k_proj.bias is None
    before = block.q_proj(some(4, 6))
    with torch.no_grad():
        block.q_proj.bias.add_(1)
    assert same(block.q_proj(some(4, 6)), before + 1)


def test_no_second_derivatives(block: Any) -> None:
    x = some(4, 6).requires_grad_()
    gradient = torch.autograd.grad(block.c_fc(x).pow(2).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_they_pass_for_what_they_replace(block: Any) -> None:
    assert isinstance(block.q_proj, ProtectedLinear) and isinstance(block.q_proj, nn.Linear)
    assert isinstance(block.c_fc, ProtectedConv1D) and isinstance(block.c_fc, Conv1D)
    assert (block.q_proj.in_features, block.q_proj.out_features) == (6, 5)
    assert (block.c_fc.nx, block.c_fc.nf) == (6, 7)


def test_no_weight_is_in_the_state(model: Any) -> None:
    biases = {"layers.0.q_proj.bias", "layers.0.v_proj.bias", "layers.0.c_fc.bias"}
    assert set(model.state_dict()) == {name for name, p in model.named_parameters() if p.numel()} == biases


def test_the_weight_answers_what_it_is_like(block: Any) -> None:
    weight = block.q_proj.weight
    assert weight.shape == (5, 6) and weight.size(0) == 5 and weight.dim() == weight.ndim == 2
    assert weight.dtype == torch.float64 and weight.device.type == "cpu"
    assert weight.numel() == 30 and weight.element_size() == 8 and weight.is_floating_point()
    assert not weight.requires_grad and weight.grad is None
    assert block.c_fc.weight.shape == (6, 7)
    assert "on the worker" in repr(weight)
    assert block.q_proj.float().weight.dtype == torch.float32


USES: dict[str, Callable[[Tensor], object]] = {
    "add": lambda weight: weight + 1,
    "add in place": lambda weight: weight.add_(1),
    "product": lambda weight: torch.ones(1, 5, dtype=torch.float64) @ weight,
    "linear": lambda weight: nn.functional.linear(torch.ones(6, dtype=torch.float64), weight),
    "clone": lambda weight: weight.clone(),
    "data": lambda weight: weight.data,
    "transpose": lambda weight: weight.T,
    "item": lambda weight: weight[0, 0],
    "list": lambda weight: weight.tolist(),
    "numpy": lambda weight: weight.numpy(),
    "isnan": torch.isnan,
    "norm": torch.linalg.norm,
    "cast": lambda weight: weight.float(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_the_weight_cannot_be_computed_with(block: Any, use: Callable[[Tensor], object]) -> None:
    with pytest.raises(ProtectionError, match="lies on the worker"):
        use(block.q_proj.weight)


def test_beneath_the_weight_is_nan(block: Any) -> None:
    """Should some path go round the refusal, nothing that looks like a number comes out."""
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.isnan(block.q_proj.weight).all()


def test_the_weight_cannot_be_set(block: Any) -> None:
    with pytest.raises(ProtectionError, match="neither read nor set"):
        block.q_proj.weight = torch.zeros(5, 6)
    with pytest.raises(ProtectionError, match="neither read nor set"):
        block.q_proj.weight = nn.Parameter(torch.zeros(5, 6))


def test_no_copies(model: Any) -> None:
    with pytest.raises(ProtectionError, match="cannot be copied"):
        copy.deepcopy(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_is_not_sent(model: Any, block: Any, value: float) -> None:
    x = some(4, 6)
    x[2, 3] = value
    before = model.protection.stats.bytes_sent
    with pytest.raises(NonFiniteError):
        block.q_proj(x)
    assert model.protection.stats.bytes_sent == before


def test_nan_gradients_are_not_sent(block: Any) -> None:
    x = some(4, 6).requires_grad_()
    with pytest.raises(NonFiniteError):
        (block.q_proj(x) * torch.nan).sum().backward()


def test_twice_is_refused(model: Any, worker: LocalWorker) -> None:
    with pytest.raises(ProtectionError, match="protected already"):
        protect(model, worker.address)
