"""What takes the place of `nn.Linear` and `Conv1D` in a protected model.

    ProtectedLinear / ProtectedConv1D  ->  SharedCrossing (one for all layers that multiply the same input)
        ->  OffloadedCall (autograd)  ->  OffloadedProduct

They are subclasses of what they replace, so that PEFT, `Trainer` and the models' own code treat them
alike. Their `weight` is an `AbsentWeight`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.autograd import OffloadedCall, outside_autocast
from obfuscatune.enclave.placeholder_tensors import AbsentWeight, LazyProduct, refuse_weight
from obfuscatune.enclave.product import OffloadedProduct
from obfuscatune.errors import ProtectionError


@dataclass
class _Visit:
    """The input that is being served, and the layers that did not take their part of its product yet."""

    x: Tensor
    state: int | Tensor
    grad_mode: bool
    dtype: torch.dtype
    product: OffloadedProduct
    call: OffloadedCall
    members: list[ProtectedLayer]
    waiting: set[int]
    parts: tuple[Tensor, ...] | None = None

    def serves(self, x: Tensor, member: int, dtype: torch.dtype, product: OffloadedProduct) -> bool:
        return (
            self.x is x
            and self.grad_mode == torch.is_grad_enabled()
            and member in self.waiting
            and self.dtype == dtype
            and self.product is product
            and self._is_unchanged()
        )

    def part(self, member: int) -> Tensor:
        """That layer's x W + b; waits where it has not come yet."""
        if self.parts is None:
            with torch.set_grad_enabled(self.grad_mode):
                self.parts = self.call.finish(*biases_in(self.dtype, self.members))
        return self.parts[member]

    def _is_unchanged(self) -> bool:
        if isinstance(self.state, Tensor):
            return torch.equal(self.state, self.x)
        return self.state == self.x._version


def biases_in(dtype: torch.dtype, members: Sequence[nn.Module]) -> list[Tensor | None]:
    """b (q_i,) of each layer, None for one without; autocast has them in another dtype than they are kept in."""
    biases = [member._parameters["bias"] for member in members]
    return [None if bias is None else bias.to(dtype) for bias in biases]


def _state(x: Tensor) -> int | Tensor:
    """What tells whether x was changed in place: its version, or a copy where torch keeps no version."""
    return x.clone() if x.is_inference() else x._version


class SharedCrossing:
    """One product for the layers that multiply the same input: q, k, v; gate, up; or one layer alone.

    The first layer called with an input crosses for all; its siblings, called with the *same tensor* by the same
    thread, take their part of the result. A layer called with another input crosses by itself.
    """

    def __init__(self, product: OffloadedProduct, widths: tuple[int, ...]) -> None:
        self._product, self._widths = product, widths
        self._members: list[ProtectedLayer] = []
        self._of_thread = threading.local()

    @property
    def widths(self) -> tuple[int, ...]:
        """q_1, q_2, ... of the layers."""
        return self._widths

    @property
    def dtype(self) -> torch.dtype | None:
        """In which rows and products travel; None for that of what is multiplied."""
        return self._product.held.dtype

    @property
    def product(self) -> OffloadedProduct:
        """The product that layers are served by at present."""
        return self._product

    @property
    def matrix_id(self) -> bytes:
        """Under which the worker holds W_star at present."""
        return self._product.held.matrix_id

    def join(self, member: ProtectedLayer) -> int:
        """Add a layer; returns its member, the position of its columns."""
        self._members.append(member)
        return len(self._members) - 1

    def is_coarser_than(self, dtype: torch.dtype) -> bool:
        """Whether the matrix was sent in a coarser dtype, and can be sent again."""
        return self._product.is_coarser_than(dtype)

    def be_as_fine_as(self, dtype: torch.dtype) -> None:
        """See `OffloadedProduct.be_as_fine_as`."""
        self._product.be_as_fine_as(dtype)

    def multiply_by(self, product: OffloadedProduct) -> None:
        """From here on cross for this product, of the same shape; what was crossed for the other serves nobody."""
        self._product, self._visit = product, None

    def begin(self, x: Tensor) -> OffloadedCall:
        """Send x (..., p) without waiting, whoever else multiplies it; `finish` of what is returned waits.

        The first x in a finer dtype than the matrix was sent in has that sent again.
        """
        self._product.be_as_fine_as(x.dtype)
        call = OffloadedCall(self._product, self._widths)
        call.start(x)
        return call

    def output_for(self, member: int, x: Tensor, dtype: torch.dtype, works_on: Callable[[], bool]) -> Tensor:
        """That layer's x W + b (..., q_member) for x (..., p), an ordinary tensor; outside autocast.

        Args:
            dtype: that the product is asked for in, and comes in.
            works_on: whether the caller can go on with other work until the product is there: then it gets an
                `LazyProduct`, if that helps.
        """
        visit = self._visit
        if visit is None or not visit.serves(x, member, dtype, self._product):
            call = self.begin(x.to(dtype))
            waiting = set(range(len(self._members)))
            grad_mode, members = torch.is_grad_enabled(), self._members
            state = _state(x) if len(members) > 1 else 0  # nobody asks whether the input of one layer alone has changed
            visit = _Visit(x, state, grad_mode, dtype, self._product, call, members, waiting)
            self._visit = visit
        visit.waiting.remove(member)
        if not visit.waiting:
            self._visit = None  # all have come: let go of the input
        if visit.parts is None and self._product.is_computed_apart and works_on():
            shape = (*x.shape[:-1], self._widths[member])
            return LazyProduct(shape, x.new_empty((), dtype=dtype), lambda: visit.part(member))
        return visit.part(member)

    @property
    def _visit(self) -> _Visit | None:
        visit: _Visit | None = getattr(self._of_thread, "visit", None)
        return visit

    @_visit.setter
    def _visit(self, visit: _Visit | None) -> None:
        self._of_thread.visit = visit


class ProtectedLayer(nn.Module):
    """A linear layer whose weight lies, transformed, on the worker. `y = x W + b`."""

    _on_worker: nn.Parameter
    before_request: Callable[[nn.Module, Tensor], None] | None = None
    """Called with this layer and x, before anything is sent; of a model's first layer, once in each forward pass."""

    def _set_up(self, crossing: SharedCrossing, weight: Tensor, bias: nn.Parameter | None) -> None:
        self._crossing, self._member = crossing, crossing.join(self)
        self._weight_shape = weight.shape
        device = "cpu" if weight.is_meta else weight.device
        self.register_parameter("_on_worker", no_elements(weight.numel(), weight.dtype, device))
        self.register_parameter("bias", bias)
        self._parent: weakref.ref[nn.Module] | None = None
        self._name = ""

    def placed_in(self, parent: nn.Module, name: str) -> None:
        """Note where in the model it is: in `parent` under that name, or in the layer that PEFT puts there."""
        self._parent, self._name = weakref.ref(parent), name

    @property
    def weight(self) -> Tensor:
        """An `AbsentWeight`: its shape, dtype and device; its values never were in this module."""
        return AbsentWeight(self._weight_shape, self._on_worker)

    @weight.setter
    def weight(self, value: object) -> NoReturn:
        refuse_weight()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, as `nn.Module` does; the weight is refused."""
        if name == "weight":
            refuse_weight()
        super().register_parameter(name, param)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}_on_worker"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        here = state_dict | {f"{prefix}_on_worker": self._on_worker}
        super()._load_from_state_dict(here, prefix, *rest)

    def _output(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), as the plain layer computes it."""
        if torch.compiler.is_compiling():
            y: Tensor = self._output_untraced(x)
            return y
        return self._request(x, self._is_awaited)

    @torch.compiler.disable(reason="a request to a worker cannot be compiled")  # type: ignore[untyped-decorator]
    def _output_untraced(self, x: Tensor) -> Tensor:
        return self._request(x, lambda: False)

    def _request(self, x: Tensor, works_on: Callable[[], bool]) -> Tensor:
        dtype = self._dtype_for(x)
        with outside_autocast(x.device):
            if self.before_request is not None:
                self.before_request(self, x)
            return self._crossing.output_for(self._member, x, dtype, works_on)

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        """In which the plain layer would multiply x; what it would refuse is refused in its words.

        Raises:
            RuntimeError: the plain layer's, where shape or dtype of x do not fit the weight's.
            ProtectionError: x is differentiated forward, or is within `torch.func` or `vmap`.
        """
        if torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(x).tangent is not None:
            raise ProtectionError(
                "a protected layer has no forward-mode derivative and no torch.func transform (vmap, grad, jvp, ...): "
                "its product comes from the worker. Differentiate by backward(), and batch by the leading dimensions"
            )
        dtype, own = x.dtype, self._on_worker.dtype
        if torch.is_autocast_enabled(x.device.type):
            lower = torch.get_autocast_dtype(x.device.type)
            dtype, own = (lower if kind in _AUTOCAST else kind for kind in (dtype, own))
        p = self._in_features
        if dtype != own or not dtype.is_floating_point or x.dim() == 0 or x.shape[-1] != p:
            rows = x.new_empty(x.shape and (1, x.shape[-1]))
            functional.linear(rows, torch.empty(1, p, dtype=own, device=x.device))
            raise ProtectionError(f"a protected layer of {own} cannot multiply a tensor of {x.dtype}")
        return dtype

    @property
    def _in_features(self) -> int:
        raise NotImplementedError

    def _is_awaited(self) -> bool:
        """Whether what calls this is PEFT's LoRA layer, which computes its own part before it touches the product.

        Of other callers nothing is known: they, and hooks, get the product itself.
        """
        parent = None if self._parent is None else self._parent()
        caller: Any = None if parent is None else parent._modules.get(self._name)
        if type(caller) is not lora.Linear or caller._modules.get("base_layer") is not self:
            return False
        hooks = (self._forward_hooks, self._backward_hooks, self._backward_pre_hooks, caller._forward_pre_hooks)
        return not (any(hooks) or caller.disable_adapters or caller.merged)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise ProtectionError("a protected layer cannot be copied: it holds a connection to the worker")


_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)
"""What autocast casts."""


def no_elements(numel: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """A parameter in the place of one whose `numel` elements are elsewhere.

    DeepSpeed's ZeRO-3 leaves such ones behind, with the number of elements in `ds_numel`: PEFT counts by that.
    """
    parameter = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
    parameter.ds_numel = numel  # type: ignore[attr-defined]
    return parameter


class ProtectedLinear(ProtectedLayer, nn.Linear):
    """In the place of `nn.Linear`."""

    def __init__(self, crossing: SharedCrossing, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self._set_up(crossing, plain.weight, plain.bias)

    @property
    def _in_features(self) -> int:
        return self.in_features

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features)."""
        return self._output(input)


class ProtectedConv1D(ProtectedLayer, Conv1D):  # type: ignore[misc]
    """In the place of GPT-2's `Conv1D`, whose weight is (in, out)."""

    def __init__(self, crossing: SharedCrossing, plain: Conv1D) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = plain.nx, plain.nf
        self._set_up(crossing, plain.weight, plain.bias)

    @property
    def _in_features(self) -> int:
        nx: int = self.nx
        return nx

    def forward(self, x: Tensor) -> Tensor:
        """x (..., nx) -> (..., nf)."""
        return self._output(x)


def first_protected(model: nn.Module) -> ProtectedLayer | None:
    """The layer whose request is the first of each forward pass; None where nothing is on a worker."""
    return next((module for module in model.modules() if isinstance(module, ProtectedLayer)), None)


def elements_on_worker(model: nn.Module) -> int:
    """How many elements the weights of a model's protected layers and experts have."""
    named = model.named_parameters()
    return sum(parameter.ds_numel for name, parameter in named if name.endswith("_on_worker"))  # type: ignore[attr-defined]
