"""A product that is still on its way, in the place of the tensor that it will be.

PEFT's LoRA layer calls its base layer first, then computes the adapter's part, and adds the two. With an
`AwaitedProduct` from the base layer the adapter's part is computed while the worker multiplies, and whoever first does
anything else than ask for its shape waits for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

_ANSWERED = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_cpu", "is_cuda")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point")),
}
"""What can be asked without waiting."""


class AwaitedProduct(Tensor):
    """Stands for the tensor that `finish` returns; calls it once, when first needed.

    Only for callers that go through Python's operators, as PEFT's layers do. What lies beneath is NaN.
    """

    _finish: Callable[[], Tensor]
    _product: Tensor | None

    @staticmethod
    def __new__(cls, shape: Sequence[int], like: Tensor, finish: Callable[[], Tensor]) -> Self:
        """`finish` returns a tensor of that shape, of the dtype and on the device of `like`."""
        awaited = like.new_full((), torch.nan).expand(tuple(shape)).as_subclass(cls)
        awaited._finish, awaited._product = finish, None
        return awaited

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _ANSWERED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*(_received(arg) for arg in args), **{name: _received(arg) for name, arg in (kwargs or {}).items()})


def _received(arg: Any) -> Any:
    """What an argument stands for; tensors come in lists and tuples too."""
    if isinstance(arg, AwaitedProduct):
        return _product_of(arg)
    if type(arg) in (list, tuple):
        return type(arg)(_received(item) for item in arg)
    return arg


def _product_of(awaited: AwaitedProduct) -> Tensor:
    fields = vars(awaited)
    if fields["_product"] is None:
        fields["_product"] = fields.pop("_finish")()
    product: Tensor = fields["_product"]
    return product
