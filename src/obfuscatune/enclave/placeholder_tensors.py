"""Tensors that tell their shape, dtype and device while their values are not in this process.

    LazyProduct    a product that the worker still computes: the first use of its values waits for it
    AbsentWeight   a weight that lies on the worker: each use of its values raises ProtectionError

PEFT's LoRA layer calls its base layer, computes the adapter's part, and adds the two. With a `LazyProduct` from the
base layer the adapter's part is computed while the worker multiplies.

Both intercept torch's functions by `__torch_function__`. The tensor beneath is NaN: code that gets around the
interception computes NaN, not wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from obfuscatune.errors import ProtectionError

_PRODUCT_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_cpu", "is_cuda")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point")),
}
"""Functions that a `LazyProduct` answers without waiting."""
_WEIGHT_METADATA = _PRODUCT_METADATA | {
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad", "grad_fn")),
    *(getattr(Tensor, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized")),
    *(getattr(Tensor, name) for name in ("nelement", "element_size", "stride", "get_device", "is_complex")),
    *(getattr(Tensor, name) for name in ("is_contiguous", "__len__")),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
"""Functions that an `AbsentWeight` answers."""


class LazyProduct(Tensor):
    """A lazy tensor: calls `finish` on first use, and then stands for the tensor that it returned.

    Only for callers that go through Python's operators, as PEFT's layers do.
    """

    _finish: Callable[[], Tensor]
    _product: Tensor | None

    @staticmethod
    def __new__(cls, shape: Sequence[int], like: Tensor, finish: Callable[[], Tensor]) -> Self:
        """`finish` returns a tensor of that shape, with the dtype and device of `like`; it is called at most once."""
        lazy = like.new_full((), torch.nan).expand(tuple(shape)).as_subclass(cls)
        lazy._finish, lazy._product = finish, None
        return lazy

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCT_METADATA:
            return _call_directly(func, args, kwargs)
        return func(*(_resolved(arg) for arg in args), **{name: _resolved(arg) for name, arg in kwargs.items()})


def _resolved(arg: Any) -> Any:
    """An argument with each `LazyProduct` replaced by its product, also within lists and tuples."""
    if isinstance(arg, LazyProduct):
        return _product_of(arg)
    if type(arg) in (list, tuple):
        return type(arg)(_resolved(item) for item in arg)
    return arg


def _product_of(lazy: LazyProduct) -> Tensor:
    fields = vars(lazy)
    if fields["_product"] is None:
        fields["_product"] = fields.pop("_finish")()
    product: Tensor = fields["_product"]
    return product


class AbsentWeight(Tensor):
    """Stands for a weight that lies on the worker. Merging an adapter, DoRA or PiSSA, which need it, get one error."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], like: Tensor) -> Self:
        """A weight of that shape, with the dtype and device of `like`."""
        return like.new_full((), torch.nan).expand(tuple(shape)).as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__repr__:
            return f"<weight {tuple(args[0].shape)} {args[0].dtype}, on the worker>"
        if func not in _WEIGHT_METADATA:
            refuse_weight()
        return _call_directly(func, args, kwargs or {})


def refuse_weight() -> NoReturn:
    """Raise the error for any attempt to read or set a weight that lies on the worker.

    Raises:
        ProtectionError: always.
    """
    raise ProtectionError(
        "the weight of a protected layer lies on the worker and can be neither read nor set here: merging an adapter, "
        "DoRA, PiSSA, OLoRA and the like need it. Use LoRA or rsLoRA, save the adapter, and merge it into the plain "
        "model where that is allowed to be"
    )


def _call_directly(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a torch function on the tensor beneath, without interception."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)
