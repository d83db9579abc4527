"""Rotation, mixing, sketches and normal deviates, each in two ways: by torch's operations, and in C++.

    interface   what a kernel is asked for, and the structured matrices that it is given
    reference   by torch: on every device, differentiable
    native      by the library of `csrc/`: one pass each, on the CPU

Which of them computes is chosen here, from the tensor alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from obfuscatune import native as _native
from obfuscatune.enclave.kernels.interface import Kernels
from obfuscatune.enclave.kernels.native import Native
from obfuscatune.enclave.kernels.reference import Reference

__all__ = ["REFERENCE", "Kernels", "Native", "for_deviates", "kernels_for", "native_for"]

REFERENCE = Reference()


def kernels_for(x: Tensor) -> Kernels:
    """The kernels that compute on x (n, p)."""
    return native_for(x) or REFERENCE


def native_for(x: Tensor) -> Native | None:
    """The native kernels where they apply to x, else None.

    They take float32 and float64 on the CPU, rows that are contiguous and at least as long as a tile's, and nothing
    that autograd is to differentiate.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return None
    if x.dim() != 2 or x.shape[0] < 1 or x.stride(1) != 1 or (x.requires_grad and torch.is_grad_enabled()):
        return None
    found = native_of(x.itemsize)
    return None if found is None or x.shape[1] < found.table.lanes else found


def for_deviates() -> Kernels:
    """The kernels that make normal deviates."""
    return native_of(4) or REFERENCE


def native_of(itemsize: int) -> Native | None:
    """The native kernels for numbers of 4 or 8 bytes; None where there are none."""
    return _native_of(itemsize) if _native.are_there() else None


@functools.cache
def _native_of(itemsize: int) -> Native | None:
    table = _native.kernels(itemsize)
    return None if table is None else Native(table)
