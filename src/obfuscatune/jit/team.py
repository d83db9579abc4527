"""Runs a kernel on torch's own OpenMP threads: they are awake when a kernel is called between two operations of torch.

A second pool of threads would wait beside the first, and take its cores while it does.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

_LIBRARIES = ("libgomp", "libiomp5", "libomp")
"""GNU's OpenMP, and LLVM's and Intel's, which on Linux answer to GNU's names as well."""


_ABOUT_PLACES = "num_places", "place_num_procs", "place_proc_ids"


def run(kernel: int, job: int, threads: int) -> None:
    """Call `kernel(job)` on that many threads at once, this one among them; returns when all have."""
    if threads == 1:
        _FUNCTION(kernel)(job)
    else:
        _parallel()(kernel, job, threads, 0)


def find() -> None:
    """Look for torch's OpenMP library.

    Raises:
        OSError: torch computes on other threads here.
        AttributeError: its library cannot be called upon.
    """
    _parallel()


def parallel_address() -> int:
    """Of GOMP_parallel, for a kernel that calls upon threads itself."""
    return ctypes.cast(_parallel(), ctypes.c_void_p).value or 0


def bound_cores() -> set[int]:
    """All cores that threads are bound to, by OMP_PROC_BIND and the like; empty where they are not bound.

    The thread that imported torch may itself use only one of them then, and whatever it starts inherits that.
    """
    try:
        openmp = ctypes.CDLL(str(_library()))
        places, size_of, list_of = (getattr(openmp, f"omp_get_{name}") for name in _ABOUT_PLACES)
    except (OSError, AttributeError):  # no OpenMP, or one that binds nothing
        return set()
    cores: set[int] = set()
    for place in range(places()):
        ids = (ctypes.c_int * size_of(place))()
        list_of(place, ids)
        cores.update(ids)
    return cores


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _parallel() -> ctypes._NamedFuncPointer:
    """GOMP_parallel(function, data, threads, flags) of the library that torch brought."""
    parallel = ctypes.CDLL(str(_library())).GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def _library() -> Path:
    """The OpenMP library that is loaded in this process."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    loaded = {Path("/" + line.partition("/")[2]) for line in maps if "/" in line}
    for path in sorted(loaded):
        if path.name.startswith(_LIBRARIES):
            return path
    raise OSError("no OpenMP library is loaded")
