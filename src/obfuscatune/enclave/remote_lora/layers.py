"""The crossing of layers whose adapters are on the worker: y = x W + s · drop(x) A B, all of it there.

    forward       X* = x R_in       ->  Y* = X* W* + s · drop(X*) A* B*     ->  y  = Y* R_out⁻¹
    backward      G* = g R_out⁻ᵀ    ->  D* = ∂/∂X*, and A*, B* gain their gradients  ->  dx = D* R_inᵀ

The factors' gradients are sums over rows of products of what was sent forward and backward, so both go unmixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from obfuscatune.enclave.autograd import as_parts, as_rows, outside_autocast
from obfuscatune.enclave.client import AdapterClient, check_finite, check_product
from obfuscatune.enclave.layers import SharedCrossing, _state, biases_in
from obfuscatune.enclave.remote_lora.adapter import RemoteAdapter
from obfuscatune.enclave.transforms import widen
from obfuscatune.errors import ProtectionError


class AdaptedCrossing:
    """Stands where a `SharedCrossing` stood; goes back to it while PEFT has the adapter switched off."""

    def __init__(self, plain: SharedCrossing, adapter: RemoteAdapter) -> None:
        self._plain, self._adapter = plain, adapter
        self._anchor = torch.zeros((), requires_grad=True)  # what trains is elsewhere, yet y has a gradient
        self._x: Tensor | None = None
        self._served: Any = None
        self._parts: dict[int, Tensor] = {}

    def output_for(self, member: int, x: Tensor, dtype: torch.dtype, works_on: Callable[[], bool]) -> Tensor:
        """As `SharedCrossing`'s; the worker's product has the adapter's part in it, and is waited for at once."""
        if not self._is_active():
            return self._plain.output_for(member, x, dtype, works_on)
        served = torch.is_grad_enabled(), self._is_training()
        if self._plain.is_coarser_than(dtype):
            carried = self._adapter.take_down()
            self._plain.be_as_fine_as(dtype)
            self._adapter.put_up(carried)
        state = (*served, dtype, _version(x))
        if self._x is not x or self._served != state or member not in self._parts:
            biases = biases_in(dtype, self._plain._members)
            parts = _Adapted.apply(  # type: ignore[no-untyped-call]
                x.to(dtype), self._anchor, self._adapter, *served, *biases
            )
            self._x, self._served, self._parts = x, state, dict(enumerate(parts))
        y = self._parts.pop(member)
        if not self._parts:
            self._x = self._served = None
        return y

    def forget_visit(self) -> None:
        """What was crossed so far is of no use any more."""
        self._x, self._served, self._parts = None, None, {}

    def _is_active(self) -> bool:
        return _alike([it.is_active for it in self._adapter.layers], "adapter active")

    def _is_training(self) -> bool:
        return _alike([it.layer.lora_dropout[it.name].training for it in self._adapter.layers], "dropout in training")


def _alike(values: list[bool], what: str) -> bool:
    if any(values) != all(values):
        raise ProtectionError(f"of layers that cross as one, some have their {what} and some have not")
    return all(values)


def _version(x: Tensor) -> object:
    """What tells whether x was changed in place. Tensors of inference mode keep no version: they cross each time."""
    return object() if x.is_inference() else _state(x)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        anchor: Tensor,
        adapter: RemoteAdapter,
        keep: bool,
        training: bool,
        *biases: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """x (..., p) -> one (..., q_i) for each layer."""
        number = AdapterClient.new_number() if keep else 0
        offloaded, remote = adapter.offloaded, adapter.remote
        dtype = offloaded.crossing.dtype or x.dtype
        ctx.saved = offloaded, offloaded.R_in, offloaded.R_out, remote, number, dtype  # type: ignore[attr-defined]
        widths = adapter.widths
        rows = as_rows(x)
        if rows.shape[0] == 0:
            y = x.new_zeros(0, sum(widths))
        else:
            if offloaded.observe is not None:
                offloaded.observe(rows, False)
            X_star = _laid_out(remote, offloaded.R_in.apply(widen(rows)), dtype)
            Y_star = remote.forward(X_star, number=number, dropout=training, known_finite=True)
            y = _own(offloaded.R_out.inverse(widen(Y_star.to(x.device))).to(x.dtype), Y_star, remote)
        parts = as_parts(y, x.shape[:-1], widths)
        for part, bias in zip(parts, biases, strict=True):
            if bias is not None:
                part.add_(bias)
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Any, ...]:
        """Gradients (..., q_i) -> that of x; those of the factors stay on the worker."""
        offloaded, R_in, R_out, remote, number, dtype = ctx.saved  # type: ignore[attr-defined]
        g = grads[0] if len(grads) == 1 else torch.cat(grads, dim=-1)
        rows = as_rows(g)
        if rows.shape[0] == 0:
            dx = g.new_zeros(*g.shape[:-1], R_in.dim)
        else:
            if offloaded.observe is not None:
                offloaded.observe(rows, True)
            with outside_autocast(g.device):
                G_star = _laid_out(remote, R_out.inverse_transpose(widen(rows)), dtype)
                D_star = remote.backward(G_star, number=number, known_finite=True)
                dx = _own(R_in.apply_transpose(widen(D_star.to(g.device))).to(g.dtype), D_star, remote)
            dx = dx.view(*g.shape[:-1], R_in.dim)
        nothing = (None,) * (len(ctx.needs_input_grad) - 1)  # type: ignore[attr-defined]
        return (dx if ctx.needs_input_grad[0] else None, *nothing)  # type: ignore[attr-defined]


def _laid_out(remote: AdapterClient, rotated: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows where they are sent from, in the dtype that they travel in. Looked at before: there they can change."""
    rows = rotated.to("cpu", dtype)
    check_finite(rows)
    return remote.allocate(rows.shape[0], rows.shape[1], dtype).copy_(rows)


def _own(result: Tensor, received: Tensor, remote: AdapterClient) -> Tensor:
    """The result, finite, in memory of our own: what was received may lie where the worker can change it, and a
    transform that is 1 gives it back as it is."""
    shared = result.untyped_storage().data_ptr() == received.untyped_storage().data_ptr()
    with remote.refusing():
        return check_product(result.clone() if shared else result)
