"""Rows scaled to one size before they are mixed, and their products scaled back.

Mixing spreads the rounding error of each row over all: beside a row that is a thousand times as large as the others, as
the first token's often is, the others would lose three digits. So each row is multiplied by a power of two of its own

    D = diag(2^-e)    root mean square of each row of D x in (1/2, 1]
    x -> D x  ->  mixed, multiplied, unmixed  ->  D x W  ->  D⁻¹ (D x W) = x W

Powers of two round nothing. Rows of 16-bit numbers are brought to one size exactly, so that the rounding of what is
sent costs each the same; float32, which they are scaled in, is rounded far beyond their digits.

The scales stay in the enclave: of the size of a row nothing is sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from obfuscatune.enclave.link.pending import check_finite

SIZE_OF_ROWS = 0.75
"""Root mean square of scaled 16-bit rows, and the middle of what others have; that of shield rows."""
LARGEST_EXPONENT = {torch.float32: 126, torch.float64: 1022}
"""Of a scale: beyond, it or its inverse is no normal number. Rows beyond stay smaller or larger than the others."""
_SQUARES = {torch.float32: 2.0**50, torch.float64: 2.0**450}
"""Sizes up to which, and of whose inverse on, the sum of a row's squares neither overflows nor vanishes."""


@dataclass(frozen=True)
class RowScales:
    """One factor for each row of x (n, p), in float64 where x is, and in float32 otherwise.

    A power of two, unless x has 16 bits: see above.
    """

    down: Tensor
    """(n, 1)."""
    up: Tensor
    """1 / down (n, 1); 0 for a row of zeros, whose product is nothing but the others' rounding errors."""
    mean_square: float
    """Of all elements of D x."""

    @classmethod
    def of(cls, x: Tensor) -> RowScales:
        """The scales of x (n, p), of any floating dtype, on any device. A row of zeros stays one.

        Raises:
            NonFiniteError: some element is NaN or infinite.
        """
        x = x.detach()
        wide = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(x, dim=1, dtype=wide)
        sizes = norms.double().cpu().numpy() / math.sqrt(x.shape[1])
        doubtful = ~((sizes > 1 / _SQUARES[wide]) & (sizes < _SQUARES[wide]))
        is_ordinary = not doubtful.any()
        if not is_ordinary:
            sizes[doubtful] = _sizes_by_peaks(x[torch.from_numpy(doubtful).to(x.device)].to(wide))
        if x.itemsize == 2:
            up = np.where(sizes > 0, sizes / SIZE_OF_ROWS, 1.0)
        else:
            mantissas, exponents = np.frexp(sizes)
            up = np.ldexp(1.0, exponents - (mantissas == 0.5))
        if not is_ordinary:
            np.clip(up, 2.0 ** -LARGEST_EXPONENT[wide], 2.0 ** LARGEST_EXPONENT[wide], out=up)
        down = 1 / up
        if not is_ordinary:
            up[sizes == 0] = 0
        scaled = sizes * down
        column_down, column_up = (torch.from_numpy(powers).to(x.device, wide).unsqueeze(-1) for powers in (down, up))
        return cls(column_down, column_up, float(scaled @ scaled) / len(scaled))

    def scaled(self, x: Tensor) -> Tensor:
        """D x (n, p) in the dtype of the scales, contiguous, in memory of its own."""
        return torch.mul(x.detach(), self.down, out=self.down.new_empty(x.shape))

    def undo(self, y: Tensor) -> Tensor:
        """D⁻¹ y in the place of y (n, q)."""
        return y.mul_(self.up)


def _sizes_by_peaks(rows: Tensor) -> NDArray[np.float64]:
    """The root mean squares (k,) of rows (k, p) whose squares may overflow or vanish."""
    check_finite(rows)
    peaks = torch.linalg.vector_norm(rows, ord=math.inf, dim=1)
    peaks = torch.where(peaks == 0, 1.0, peaks)
    norms = torch.linalg.vector_norm(rows / peaks.unsqueeze(1), dim=1)  # from 1 on, or 0
    sizes: NDArray[np.float64] = (peaks.double() * norms.double() / math.sqrt(rows.shape[1])).cpu().numpy()
    return sizes
