"""Operations counted as they happen: what matrix products compute, read and write, and what all others write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_FACTORS = {_aten.mm: (0, 1), _aten.bmm: (0, 1), _aten.addmm: (1, 2), _aten.baddbmm: (1, 2)}
"""Which arguments are multiplied."""


class ProductCounter(TorchDispatchMode):
    """While it is entered, every product that torch computes is counted; what compiled kernels do is not.

    Attention that is computed as one operation is not counted either: where it is, it is fast on either side.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.nbytes = 0
        """Of both factors and the product, each time."""
        self.other_nbytes = 0
        """That other operations wrote."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count and compute."""
        factors = _FACTORS.get(func.overloadpacket)
        if factors is None:
            with self:  # what is made of other operations is seen through them
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
            result = func(*args, **(kwargs or {}))
            if not func.is_view:
                results = result if isinstance(result, tuple | list) else (result,)
                self.other_nbytes += sum(x.numel() * x.itemsize for x in results if isinstance(x, Tensor))
            return result
        result = func(*args, **(kwargs or {}))
        self.count(args[factors[0]], args[factors[1]], result)
        return result

    def count(self, a: Tensor, b: Tensor, result: Tensor) -> None:
        """One product of a (…, n, k) by b with that result."""
        self.flops += 2 * result.numel() * a.shape[-1]
        self.nbytes += sum(x.numel() * x.itemsize for x in (a, b, result))
