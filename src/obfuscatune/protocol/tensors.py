"""A matrix as the bytes that cross the wire: the tensor's own memory, never a copy. Four dtypes may cross."""

import hashlib
import math
import sys
from collections.abc import Iterable
from enum import IntEnum
from mmap import mmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from obfuscatune.errors import ConfigError


class DType(IntEnum):
    """Code of an element type in a header. NONE stands in messages that carry no matrix."""

    NONE = 0
    FLOAT64 = 1
    FLOAT32 = 2
    BFLOAT16 = 3
    FLOAT16 = 4

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZE[self]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same type as torch names it. KeyError for NONE, which is no type."""
        return _TORCH[self]

    @classmethod
    def of(cls, dtype: torch.dtype) -> "DType":
        """The code of a torch dtype.

        Raises:
            ConfigError: it is not one of the four.
        """
        try:
            return _CODE[dtype]
        except KeyError:
            known = ", ".join(str(t).removeprefix("torch.") for t in _CODE)
            raise ConfigError(f"the wire carries {known}; {dtype} came: convert it first") from None


ITEMSIZE = {DType.NONE: 0, DType.FLOAT64: 8, DType.FLOAT32: 4, DType.BFLOAT16: 2, DType.FLOAT16: 2}
"""Bytes of one element."""
_TORCH = {
    DType.FLOAT64: torch.float64,
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
}
_CODE = {dtype: code for code, dtype in _TORCH.items()}


_NUMPY: dict[torch.dtype, type[np.generic]] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.bfloat16: np.int16,  # numpy has no such type: these are its bits
    torch.float16: np.float16,
    torch.uint8: np.uint8,
}
_FEW = 4096
"""Elements that a BLAS multiplies up sooner than numpy has been told what to ignore in a sum."""


def array_in(memory: mmap, offset: int, rows: int, cols: int, dtype: torch.dtype) -> NDArray[Any]:
    """The (rows, cols) array at an offset of memory where the caller knows that it fits, for `matrix_of`.

    By numpy, which takes a third of the time that torch takes for it.
    """
    return np.ndarray((rows, cols), _NUMPY[dtype], memory, offset)


def matrix_of(array: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The matrix of that dtype in the memory of an array from `array_in`, which it keeps alive."""
    matrix = torch.from_numpy(array)
    return matrix.view(dtype) if dtype == torch.bfloat16 else matrix


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes, row-major and little-endian.

    Raises:
        ConfigError: the tensor is not contiguous, not on the CPU, or this machine is big-endian.
    """
    if not tensor.is_cpu or not tensor.is_contiguous():
        raise ConfigError(f"expected a contiguous tensor on the CPU, got stride {tensor.stride()} on {tensor.device}")
    if sys.byteorder != "little":
        raise ConfigError("the wire is little-endian and does not convert; this machine is big-endian")
    if tensor.numel() == 0:
        return memoryview(bytearray())
    elements = tensor.detach() if tensor.requires_grad else tensor
    if tensor.dtype == torch.bfloat16:  # which numpy does not know
        elements = elements.view(torch.int16)
    return memoryview(elements.numpy()).cast("B")  # type: ignore[arg-type]  # a buffer since PEP 688


def content_digest(tensor: torch.Tensor) -> bytes:
    """SHA-256 (32 bytes) over dtype code (u8), rows (u32), columns (u32) and the elements of a (p, q) matrix."""
    digest = hashlib.sha256(bytes([DType.of(tensor.dtype)]))
    for dim in tensor.shape:
        digest.update(dim.to_bytes(4, "little"))
    digest.update(bytes_of(tensor))
    return digest.digest()


def weight_digest(W: torch.Tensor) -> bytes:
    """`content_digest` of a published weight W (p, q) in the one form that all who have it come to.

    That is float32 where it holds every element exactly, as it does those of a bfloat16 or float16 weight, and else W
    itself, in float64.
    """
    narrow = torch.empty(W.shape, dtype=torch.float32).copy_(W.detach())
    exact = W.dtype != torch.float64 or torch.equal(narrow.to(torch.float64), W)
    return content_digest(narrow if exact else W.contiguous())


_COPIED = 1 << 22
"""Elements that torch may copy at a time to look at them."""


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite.

    One pass for a sum, at memory speed: a NaN or an infinity never leaves a sum finite, be it of the elements or, of
        few, of their squares. It may overflow although every element is finite, so only then each is looked at.
    """
    if tensor.is_cpu and tensor.dtype in (torch.float64, torch.float32):
        # numpy and not torch: as fast on one core, and it wakes no OpenMP threads that spin next to the worker's
        elements = (tensor.detach() if tensor.requires_grad else tensor).numpy()
        if elements.size <= _FEW:
            total = float(np.vdot(elements, elements))
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                total = float(np.add.reduce(elements, axis=None))
    else:
        total = sum(float(tile.sum(dtype=torch.float32)) for tile in _tiles(tensor))
    return math.isfinite(total) or all(bool(torch.isfinite(tile).all()) for tile in _tiles(tensor))


def _tiles(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """A tensor some rows at a time: torch adds 16-bit numbers up in a float32 copy of them."""
    if tensor.numel() <= _COPIED:
        return (tensor,)
    parts: Iterable[torch.Tensor] = tensor.split(max(1, _COPIED * tensor.shape[0] // tensor.numel()))
    return parts
