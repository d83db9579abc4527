"""What mixing hands to the kernels for few rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MixingOfFew:
    """The secrets of one crossing of n rows, as the kernels take them, all contiguous and of one dtype."""

    Q: Tensor
    """(m, m), orthogonal."""
    stack: Tensor
    """(m, p): room for n rows above m - n normal ones."""
    mixed_by: Tensor
    """(m, m): room for A."""
    loudness: float
    """Size of the shield rows over that of x."""
