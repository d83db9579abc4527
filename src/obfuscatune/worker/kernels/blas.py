"""The product of the BLAS that torch brought, for kernels to call.

Only MKL's is taken: called by one of several threads it computes on that thread alone, and it is in torch's own library
under the names that BLAS has had since Fortran.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

_NAMES = {4: "sgemm_", 8: "dgemm_"}


@functools.cache
def gemm(itemsize: int) -> int:
    """Address of C = α op(A) op(B) + β C for numbers of 4 or 8 bytes; all arguments by address.

    Raises:
        OSError: torch's library is not where it should be.
        AttributeError: there is no such function in it.
    """
    if not torch.backends.mkl.is_available():
        raise AttributeError("torch was built without MKL")
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return ctypes.cast(getattr(library, _NAMES[itemsize]), ctypes.c_void_p).value or 0
