"""The offloaded product y = x W: forward and backward, and the one autograd function around them.

    worker holds      W* = R_in⁻¹ W R_out                      sent once
    forward           X* = A [x R_in; N]    ->  Y* = X* W*     ->  y  = (Aᵀ Y*)[:n] R_out⁻¹
    backward          G* = A' [g R_out⁻ᵀ; N'] -> D* = G* W*ᵀ   ->  dx = (A'ᵀ D*)[:n] R_inᵀ

Exact up to rounding for any invertible R; for orthogonal R the inverse is the transpose and nothing
is amplified. W is frozen, so there is no gradient for it and nothing of the activations is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.profiler import record_function

from obfuscatune.enclave.link import WorkerLink
from obfuscatune.enclave.mixing import Mixer
from obfuscatune.enclave.transforms import Transform


class OffloadedProduct:
    """x (n, p) -> x W (n, q) for a W that lies on the worker as W_star."""

    def __init__(self, link: WorkerLink, matrix_id: bytes, R_in: Transform, R_out: Transform, mixer: Mixer) -> None:
        self._link, self._matrix_id = link, matrix_id
        self._R_in, self._R_out = R_in, R_out
        self._mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """y = x W: (n, p) -> (n, q), in x's dtype and on its device."""
        if x.shape[0] == 0:
            return x.new_zeros(0, self._R_out.dim)
        A = self._mixer.draw(x.shape[0])
        with record_function("obfuscatune.rotate"):
            rotated = self._R_in.apply(_widen(x))  # (n, p)
        with record_function("obfuscatune.mix"):
            X_star = A.mix(rotated)  # (m, p)
        with record_function("obfuscatune.cross"):
            Y_star = self._cross(X_star, x, transpose=False)  # (m, q)
        with record_function("obfuscatune.mix"):
            unmixed = A.unmix(Y_star)  # (n, q)
        with record_function("obfuscatune.rotate"):
            return self._R_out.inverse(unmixed).to(x.dtype)

    def backward(self, g: Tensor) -> Tensor:
        """dx = g Wᵀ: (n, q) -> (n, p), in g's dtype and on its device."""
        if g.shape[0] == 0:
            return g.new_zeros(0, self._R_in.dim)
        A = self._mixer.draw(g.shape[0])
        with record_function("obfuscatune.rotate"):
            rotated = self._R_out.inverse_transpose(_widen(g))  # (n, q)
        with record_function("obfuscatune.mix"):
            G_star = A.mix(rotated)  # (m, q)
        with record_function("obfuscatune.cross"):
            D_star = self._cross(G_star, g, transpose=True)  # (m, p)
        with record_function("obfuscatune.mix"):
            unmixed = A.unmix(D_star)  # (n, p)
        with record_function("obfuscatune.rotate"):
            return self._R_in.apply_transpose(unmixed).to(g.dtype)

    def _cross(self, rows: Tensor, like: Tensor, *, transpose: bool) -> Tensor:
        """One request and its reply; the rows travel in the model's dtype, rounded once."""
        sent = rows.to("cpu", like.dtype).contiguous()
        return self._link.multiply(self._matrix_id, sent, transpose=transpose).to(rows)


def _widen(x: Tensor) -> Tensor:
    """16-bit tensors are rotated and mixed in float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class OffloadedLinear(torch.autograd.Function):
    """Autograd around an ``OffloadedProduct`` that may serve several layers at once.

    The q columns of the product are those of the layers side by side; each gets its part, plus its bias.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, product: OffloadedProduct, widths: tuple[int, ...], *biases: Tensor | None
    ) -> tuple[Tensor, ...]:
        """x (..., p) -> one (..., q_i) for each width q_i."""
        ctx.product, ctx.widths = product, widths  # type: ignore[attr-defined]
        y = product.forward(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], sum(widths))
        parts = y.split(widths, dim=-1)
        for part, bias in zip(parts, biases, strict=True):
            if bias is not None:
                part.add_(bias)
        return parts if len(parts) > 1 else (y,)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Any, ...]:
        """Gradients (..., q_i) -> that of x (..., p), and those of the biases where they are trained."""
        needs_x, _, _, *needs_bias = ctx.needs_input_grad  # type: ignore[attr-defined]
        dx = None
        if needs_x:
            g = grads[0] if len(grads) == 1 else torch.cat(grads, dim=-1)
            rows = g.reshape(-1, g.shape[-1])
            dx = ctx.product.backward(rows)  # type: ignore[attr-defined]
            dx = dx.view(*g.shape[:-1], dx.shape[-1])
        d_biases = [
            grad.sum_to_size(grad.shape[-1:]) if needed else None
            for grad, needed in zip(grads, needs_bias, strict=True)
        ]
        return (dx, None, None, *d_biases)
