"""What takes the place of ``nn.Linear`` and ``Conv1D`` in a protected model.

    ProtectedLinear / ProtectedConv1D  ->  SharedCrossing (one for all layers that multiply the same input)
        ->  OffloadedLinear (autograd)  ->  OffloadedProduct

They are subclasses of what they replace, so that PEFT, ``Trainer`` and the models' own code treat them
alike. There is no weight: what stands under that name is one NaN, expanded to the weight's shape, so that
code which asks for shape, dtype or device is answered, and code which computes with it gets NaN at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.linear import OffloadedLinear, OffloadedProduct
from obfuscatune.wire.errors import ProtectionError


@dataclass
class _Visit:
    """The input that is being served, and the parts of its product that were not fetched yet."""

    x: Tensor
    version: int
    grad_mode: bool
    parts: dict[int, Tensor] = field(default_factory=dict)

    def serves(self, x: Tensor, slot: int) -> bool:
        return (
            self.x is x
            and self.version == x._version
            and self.grad_mode == torch.is_grad_enabled()
            and slot in self.parts
        )


class SharedCrossing:
    """One product for the layers that multiply the same input: q, k, v; gate, up; or one layer alone.

    The first layer called with an input crosses for all; its siblings, called with the *same tensor*,
    take their part of the result. A layer called with another input crosses by itself.
    """

    def __init__(self, product: OffloadedProduct, widths: tuple[int, ...]) -> None:
        self._product, self._widths = product, widths
        self._members: list[_ProtectedLayer] = []
        self._visit: _Visit | None = None

    def join(self, member: _ProtectedLayer) -> int:
        """Add a layer; returns its slot, the position of its columns."""
        self._members.append(member)
        return len(self._members) - 1

    def output_for(self, slot: int, x: Tensor) -> Tensor:
        """x (..., p) -> that layer's x W + b (..., q_slot)."""
        if self._visit is None or not self._visit.serves(x, slot):
            biases = [member.bias for member in self._members]
            parts: tuple[Tensor, ...] = OffloadedLinear.apply(  # type: ignore[no-untyped-call]
                x, self._product, self._widths, *biases
            )
            self._visit = _Visit(x, x._version, torch.is_grad_enabled(), dict(enumerate(parts)))
        y = self._visit.parts.pop(slot)
        if not self._visit.parts:
            self._visit = None  # all have come: let go of the input
        return y


class _ProtectedLayer(nn.Module):
    """A linear layer whose weight lies, transformed, on the worker. ``y = x W + b``."""

    def _set_up(self, crossing: SharedCrossing, weight: Tensor, bias: nn.Parameter | None) -> None:
        self._crossing, self._slot = crossing, crossing.join(self)
        self._weight_shape = weight.shape
        device = "cpu" if weight.is_meta else weight.device
        absent = torch.full((), torch.nan, dtype=weight.dtype, device=device)
        self.register_buffer("_absent_weight", absent, persistent=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """NaN in the shape of the weight that is not here: it never was in this module."""
        absent: Tensor = self._absent_weight  # type: ignore[assignment]
        return absent.expand(self._weight_shape)

    @weight.setter
    def weight(self, value: object) -> NoReturn:
        raise ProtectionError(
            "the weight of a protected layer lies on the worker and cannot be set or merged into; "
            "save the adapter and merge it into the plain model where the plain model is allowed to be"
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return self._crossing.output_for(self._slot, x)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise ProtectionError("a protected layer cannot be copied: it holds a connection to the worker")


class ProtectedLinear(_ProtectedLayer, nn.Linear):
    """In the place of ``nn.Linear``."""

    def __init__(self, crossing: SharedCrossing, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self._set_up(crossing, plain.weight, plain.bias)


class ProtectedConv1D(_ProtectedLayer, Conv1D):  # type: ignore[misc]
    """In the place of GPT-2's ``Conv1D``, whose weight is (in, out)."""

    def __init__(self, crossing: SharedCrossing, plain: Conv1D) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = plain.nx, plain.nf
        self._set_up(crossing, plain.weight, plain.bias)
