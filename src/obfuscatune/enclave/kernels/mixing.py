"""What mixing hands to the kernels for few rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MixingOfFew:
    """The secrets of one request of n rows, as the kernels take them, all contiguous and of one dtype."""

    A: Tensor
    """(m, m), orthogonal."""
    A_transposed: Tensor
    """(m, m), row by row as well."""
    stack: Tensor
    """(m, p): room for n rows above the m - n shield rows."""
