"""Factors and their moments into the worker's basis and back, in float64, rounded once to their own dtype.

    A* = R_in⁻¹ A          B* = B R_out              factors
    R_inᵀ dA               dB R_out⁻ᵀ                gradients, hence first moments
    (R_in ∘ R_in)ᵀ v       v (R_out⁻ᵀ ∘ R_out⁻ᵀ)      second moments, as if coordinates were uncorrelated

The last is an estimate: which squares a rotated gradient has does not follow from the squares of the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obfuscatune.enclave.transforms import Transform
from obfuscatune.wire.adapters import Part


class Basis:
    """Of one matrix's factors: R_in acts on A (p, r), R_out on B (r, width)."""

    def __init__(self, R_in: Transform, R_out: Transform, width: int) -> None:
        """`width`: columns that the factors have; R_out is 1 where that is not all of them."""
        self._R_in = R_in
        self._R_out = R_out if R_out.dim == width else None

    def outward(self, part: Part, value: Tensor) -> Tensor:
        """As the worker is to hold it."""
        return self._through(part, value, out=True)

    def inward(self, part: Part, value: Tensor) -> Tensor:
        """As it is here."""
        return self._through(part, value, out=False)

    def _through(self, part: Part, value: Tensor, *, out: bool) -> Tensor:
        x = value.detach().cpu().double()
        match part:
            case Part.A:
                x = self._R_in.weight_left(x) if out else self._R_in.apply_transpose(x.T).T
            case Part.A_FIRST:
                x = (self._R_in.apply if out else self._R_in.inverse)(x.T).T
            case Part.A_SECOND:
                x = (x.T @ _squares(self._R_in, inverse=not out)).T
            case _ if self._R_out is None:
                pass
            case Part.B:
                x = (self._R_out.apply if out else self._R_out.inverse)(x)
            case Part.B_FIRST:
                x = (self._R_out.inverse_transpose if out else self._R_out.apply_transpose)(x)
            case Part.B_SECOND:
                x = x @ _squares(self._R_out, inverse=out).T
        return x.to(value.dtype).contiguous()


def _squares(R: Transform, *, inverse: bool) -> Tensor:
    """R ∘ R, or R⁻¹ ∘ R⁻¹: (dim, dim), float64."""
    one = torch.eye(R.dim, dtype=torch.float64)
    return (R.inverse(one) if inverse else R.apply(one)).square()
