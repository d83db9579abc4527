"""What takes the place of `nn.Linear` and `Conv1D` in a protected model.

    ProtectedLinear / ProtectedConv1D  ->  SharedCrossing (one for all layers that multiply the same input)
        ->  OffloadedCall (autograd)  ->  OffloadedProduct

They are subclasses of what they replace, so that PEFT, `Trainer` and the models' own code treat them
alike. There is no weight: what stands under that name answers for its shape, dtype and device, and refuses
to be computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.awaited import AwaitedProduct
from obfuscatune.enclave.linear import OffloadedCall, OffloadedProduct
from obfuscatune.wire.errors import ProtectionError

_ANSWERED = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn")
    ),
    *(getattr(Tensor, name).__get__ for name in ("is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "element_size", "stride", "get_device")),
    *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex", "is_contiguous", "__len__")),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}


class AbsentWeight(Tensor):
    """In the place of a weight that lies on the worker: what it is like can be asked, its values cannot.

    Code that would compute with them, PEFT's merging, DoRA or PiSSA say, gets one clear error in place of
    numbers that mean nothing. Should some path pass that by, what lies beneath is NaN.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__repr__:
            return f"<weight {tuple(args[0].shape)} {args[0].dtype}, on the worker>"
        if func not in _ANSWERED:
            _refuse_weight()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _refuse_weight() -> NoReturn:
    raise ProtectionError(
        "the weight of a protected layer lies on the worker and can be neither read nor set here: merging an adapter, "
        "DoRA, PiSSA, OLoRA and the like need it. Use LoRA or rsLoRA, save the adapter, and merge it into the plain "
        "model where that is allowed to be"
    )


@dataclass
class _Visit:
    """The input that is being served, and the layers that did not take their part of its product yet."""

    x: Tensor
    state: int | Tensor
    grad_mode: bool
    call: OffloadedCall
    members: list[_ProtectedLayer]
    waiting: set[int]
    parts: tuple[Tensor, ...] | None = None

    def serves(self, x: Tensor, slot: int) -> bool:
        return (
            self.x is x and self.grad_mode == torch.is_grad_enabled() and slot in self.waiting and self._is_unchanged()
        )

    def part(self, slot: int) -> Tensor:
        """That layer's x W + b; waits where it has not come yet."""
        if self.parts is None:
            with torch.set_grad_enabled(self.grad_mode):
                self.parts = self.call.finish(*(member.bias for member in self.members))  # type: ignore[arg-type]
        return self.parts[slot]

    def _is_unchanged(self) -> bool:
        if isinstance(self.state, Tensor):
            return torch.equal(self.state, self.x)
        return self.state == self.x._version


def _state(x: Tensor) -> int | Tensor:
    """What tells whether x was changed in place: its version, or a copy where torch keeps no version."""
    return x.clone() if x.is_inference() else x._version


class SharedCrossing:
    """One product for the layers that multiply the same input: q, k, v; gate, up; or one layer alone.

    The first layer called with an input crosses for all; its siblings, called with the *same tensor*,
    take their part of the result. A layer called with another input crosses by itself.
    """

    def __init__(self, product: OffloadedProduct, widths: tuple[int, ...]) -> None:
        self._product, self._widths = product, widths
        self._members: list[_ProtectedLayer] = []
        self._visit: _Visit | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """q_1, q_2, ... of the layers."""
        return self._widths

    def join(self, member: _ProtectedLayer) -> int:
        """Add a layer; returns its slot, the position of its columns."""
        self._members.append(member)
        return len(self._members) - 1

    def multiply_by(self, product: OffloadedProduct) -> None:
        """From here on cross for this product, of the same shape; what was crossed for the other is let go."""
        self._product, self._visit = product, None

    def output_for(self, slot: int, x: Tensor, *, awaited: bool) -> Tensor:
        """x (..., p) -> that layer's x W + b (..., q_slot); where `awaited`, as an `AwaitedProduct`, if that helps."""
        visit = self._visit
        if visit is None or not visit.serves(x, slot):
            call = OffloadedCall(self._product, self._widths)
            call.start(x)
            waiting = set(range(len(self._members)))
            visit = self._visit = _Visit(x, _state(x), torch.is_grad_enabled(), call, self._members, waiting)
        visit.waiting.remove(slot)
        if not visit.waiting:
            self._visit = None  # all have come: let go of the input
        if awaited and visit.parts is None and self._product.is_computed_apart:
            shape = (*x.shape[:-1], self._widths[slot])
            return AwaitedProduct(shape, x.detach(), lambda: visit.part(slot))
        return visit.part(slot)


class _ProtectedLayer(nn.Module):
    """A linear layer whose weight lies, transformed, on the worker. `y = x W + b`."""

    _is_awaited = False
    """Whether what calls this layer can go on with other work until the product is there."""

    def _set_up(self, crossing: SharedCrossing, weight: Tensor, bias: nn.Parameter | None) -> None:
        self._crossing, self._slot = crossing, crossing.join(self)
        self._weight_shape = weight.shape
        device = "cpu" if weight.is_meta else weight.device
        absent = torch.full((), torch.nan, dtype=weight.dtype, device=device)
        self.register_buffer("_absent_weight", absent, persistent=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """An `AbsentWeight`: its shape, dtype and device; its values never were in this module."""
        absent: Tensor = self._absent_weight  # type: ignore[assignment]
        return absent.expand(self._weight_shape).as_subclass(AbsentWeight)

    @weight.setter
    def weight(self, value: object) -> NoReturn:
        _refuse_weight()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As everywhere, but for the weight."""
        if name == "weight":
            _refuse_weight()
        super().register_parameter(name, param)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return self._crossing.output_for(self._slot, x, awaited=self._is_awaited)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise ProtectionError("a protected layer cannot be copied: it holds a connection to the worker")


class ProtectedLinear(_ProtectedLayer, nn.Linear):
    """In the place of `nn.Linear`."""

    def __init__(self, crossing: SharedCrossing, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self._set_up(crossing, plain.weight, plain.bias)


class ProtectedConv1D(_ProtectedLayer, Conv1D):  # type: ignore[misc]
    """In the place of GPT-2's `Conv1D`, whose weight is (in, out)."""

    def __init__(self, crossing: SharedCrossing, plain: Conv1D) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = plain.nx, plain.nf
        self._set_up(crossing, plain.weight, plain.bias)


def _note_caller(caller: nn.Module, name: str, layer: nn.Module | None) -> None:
    """PEFT's LoRA layer computes its own part before it touches that of its base layer; of others we do not know."""
    if isinstance(layer, _ProtectedLayer):
        layer._is_awaited = type(caller) is lora.Linear and name == "base_layer"


register_module_module_registration_hook(_note_caller)
