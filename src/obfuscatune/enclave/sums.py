"""Products by a few columns whose sums are long: they are to err no more than their rounding at the end would."""

from __future__ import annotations

import torch
from torch import Tensor

PART = 256
"""Elements that are summed in their own dtype before the sum goes on in float64."""


def product_in_parts(x: Tensor, v: Tensor) -> Tensor:
    """x v (n, k) in float64 for x (n, p) and v (p, k) of one dtype, on one device; k a few.

    What a sum in float32 errs by grows with its length: over a few thousand elements, by as much as a check of the
    result tolerates.
    """
    total = torch.zeros(x.shape[0], v.shape[1], dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[1], PART):
        total += x[:, start : start + PART] @ v[start : start + PART]
    return total
