"""One call of an offloaded product within torch's autograd: what a plain linear layer's call would be.

x (..., p)  ->  rows (n, p)  ->  OffloadedProduct, outside autocast  ->  (n, q)  ->  one tensor for each layer
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from obfuscatune.enclave.product import InFlight, OffloadedProduct


class OffloadedCall:
    """One call of an `OffloadedProduct` that may serve several layers at once, with its place in the autograd graph.

        x  ->  start  ->  token  ->  finish  ->  y

    Two nodes, so that each way what lies between start and finish runs while the worker computes: forward, what the
    caller does before it calls `finish`; backward, what hangs on the same gradient and came into the graph before
    `finish` did.
    """

    def __init__(self, product: OffloadedProduct, widths: tuple[int, ...]) -> None:
        """The q columns of the product are those of the layers side by side: `widths` of them each."""
        self.product, self.widths = product, widths
        self.forth: InFlight | None = None
        self.back: InFlight | None = None
        self._shape = torch.Size()
        self._token: Tensor | None = None

    def start(self, x: Tensor) -> None:
        """Send x (..., p)."""
        self._shape = x.shape[:-1]
        if torch.is_grad_enabled():
            self._token = _Start.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            self.send(x)

    def finish(self, *biases: Tensor | None) -> tuple[Tensor, ...]:
        """Wait; one (..., q_i) for each layer, plus its bias."""
        token, self._token = self._token, None
        if token is None:
            return self.receive(self._shape, biases)
        parts: tuple[Tensor, ...] = _Finish.apply(token, self, self._shape, *biases)  # type: ignore[no-untyped-call]
        return parts

    def send(self, x: Tensor) -> None:
        """Send x (..., p); no autograd."""
        with outside_autocast(x.device):
            self.forth = self.product.start_forward(as_rows(x))

    def receive(self, shape: torch.Size, biases: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """The parts of the product, (*shape, q_i) each, with their biases; no autograd."""
        crossing, self.forth = self.forth, None
        with outside_autocast(crossing.like.device):  # type: ignore[union-attr]
            y = self.product.finish_forward(crossing, _side_by_side(biases, self.widths))  # type: ignore[arg-type]
        return as_parts(y, shape, self.widths)

    def send_back(self, grads: tuple[Tensor, ...]) -> None:
        """Send the gradients (..., q_i) of the parts."""
        g = grads[0] if len(grads) == 1 else torch.cat(grads, dim=-1)
        with outside_autocast(g.device):
            self.back = self.product.start_backward(as_rows(g))

    def receive_back(self, shape: torch.Size) -> Tensor:
        """The gradient of x, in its shape (..., p)."""
        crossing, self.back = self.back, None
        with outside_autocast(crossing.like.device):  # type: ignore[union-attr]
            return self.product.finish_backward(crossing).view(shape)  # type: ignore[arg-type]


def outside_autocast(device: torch.device | None = None) -> AbstractContextManager[Any]:
    """Within it torch computes in the dtypes that it is given, on the CPU and on `device`.

    Rotating, mixing and checking decide their precision themselves.

    A custom function's backward pass is called within the context that the caller of `backward` is in, if any.
    """
    kinds = [kind for kind in {"cpu", "cpu" if device is None else device.type} if torch.is_autocast_enabled(kind)]
    if not kinds:
        return nullcontext()
    stack = ExitStack()
    for kind in kinds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def as_rows(x: Tensor) -> Tensor:
    """x (..., p) as (n, p)."""
    return x.reshape(-1, x.shape[-1]).resolve_neg()


def as_parts(y: Tensor, shape: torch.Size, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """y (n, q_1 + q_2 + ...), memory of its own, as one contiguous (*shape, q_i) for each layer.

    None of them is a view: what a custom function returns can be changed in place only if it is not, and each keeps
    its own version, so that changing one does not spoil a backward pass through another.
    """
    parts = (y,) if len(widths) == 1 else y.split(widths, dim=1)
    own = parts if len(parts) == 1 else [part.clone(memory_format=torch.contiguous_format) for part in parts]
    each = zip(own, widths, strict=True)
    return tuple(_unsafe_view(part, [*shape, width]) for part, width in each)


_unsafe_view = torch.ops.aten._unsafe_view.default


def _side_by_side(biases: tuple[Tensor | None, ...], widths: tuple[int, ...]) -> Tensor | None:
    """(q,): zeros for a layer without one; None where none has."""
    some = next((bias for bias in biases if bias is not None), None)
    if some is None or len(biases) == 1:
        return some
    each = zip(biases, widths, strict=True)
    return torch.cat([some.new_zeros(width) if bias is None else bias for bias, width in each])


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, call: OffloadedCall) -> Tensor:
        ctx.call, ctx.shape = call, x.shape  # type: ignore[attr-defined]
        call.send(x)
        return x.new_zeros(())  # y's autograd graph hangs on it

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *_: Tensor) -> tuple[Any, ...]:
        return ctx.call.receive_back(ctx.shape), None  # type: ignore[attr-defined]


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, token: Tensor, call: OffloadedCall, shape: torch.Size, *biases: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.call = call  # type: ignore[attr-defined]
        return call.receive(shape, biases)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Any, ...]:
        needs_token, _, _, *needs_bias = ctx.needs_input_grad  # type: ignore[attr-defined]
        if needs_token:
            ctx.call.send_back(grads)  # type: ignore[attr-defined]
        d_biases = [
            grad.sum_to_size(grad.shape[-1:]) if needed else None
            for grad, needed in zip(grads, needs_bias, strict=True)
        ]
        return (grads[0].new_zeros(()) if needs_token else None, None, None, *d_biases)
