"""The native kernels: a library made of `csrc/`, for the instruction set that this processor has. Imports no sibling.

The library is built with the package where a C++ compiler is, and is part of its wheels. Where it is missing, cannot
be loaded, or is switched off, torch computes the same. docs/adr/0014 says why it is made this way.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch  # before the library, which takes its threads from torch's OpenMP

SWITCH = "OBFUSCATUNE_KERNELS"
"""Environment variable; 0 leaves everything to torch."""
LIBRARY = Path(__file__).with_name("_kernels.so")
ISAS = ("avx512", "avx2", "generic")
"""Instruction sets that the library knows, the best first. On ARM `generic` is NEON."""
VERSION = 4
"""Of the C interface, `csrc/kernels.hpp`, which the structures below mirror."""

_INT, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
log = logging.getLogger(__name__)


class Grid(ctypes.Structure):
    """Q_a ⊗ Q_b on some columns of a row."""

    _fields_ = [("start", _INT), ("a", _INT), ("b", _INT), ("q_a", _ADDRESS), ("q_b", _ADDRESS)]


class Rotation(ctypes.Structure):
    """y = x R + bias for a structured R."""

    _fields_ = [
        ("x", _ADDRESS), ("y", _ADDRESS), ("bias", _ADDRESS),
        ("rows", _INT), ("width", _INT), ("x_stride", _INT),
        ("first", _ADDRESS), ("first_inverse", _ADDRESS), ("between", _ADDRESS), ("last", _ADDRESS),
        ("grids", Grid * 2), ("threads", _INT), ("finite", _INT),
    ]  # fmt: skip


class Mixing(ctypes.Structure):
    """(Q_a ⊗ Q_b) times rows that lie anywhere."""

    _fields_ = [
        ("sources", _ADDRESS), ("targets", _ADDRESS), ("columns", _INT), ("a", _INT), ("b", _INT),
        ("q_a", _ADDRESS), ("q_b", _ADDRESS), ("transposed", _INT), ("threads", _INT), ("finite", _INT),
    ]  # fmt: skip


class Product(ctypes.Structure):
    """A product of small matrices."""

    _fields_ = [
        ("left", _ADDRESS), ("right", _ADDRESS), ("out", _ADDRESS), ("rows", _INT), ("inner", _INT), ("columns", _INT)
    ]  # fmt: skip


class FewRows(ctypes.Structure):
    """A product of few rows and a large matrix."""

    _fields_ = [
        ("x", _ADDRESS), ("w", _ADDRESS), ("out", _ADDRESS), ("m", _INT), ("p", _INT), ("q", _INT),
        ("out_stride", _INT), ("threads", _INT), ("w_itemsize", _INT),
    ]  # fmt: skip


class Sketches(ctypes.Structure):
    """W R, Lᵀ W and the squares of W."""

    _fields_ = [
        ("w", _ADDRESS), ("r", _ADDRESS), ("l", _ADDRESS), ("w_r", _ADDRESS), ("l_w", _ADDRESS),
        ("p", _INT), ("q", _INT), ("squares", ctypes.c_double),
    ]  # fmt: skip


class Projection(ctypes.Structure):
    """X V, and the squares of each row of X."""

    _fields_ = [
        ("x", _ADDRESS), ("v", _ADDRESS), ("images", _ADDRESS), ("squares", _ADDRESS),
        ("rows", _INT), ("width", _INT), ("x_stride", _INT), ("threads", _INT), ("left", _ADDRESS),
    ]  # fmt: skip


class Deviates(ctypes.Structure):
    """Normal numbers in the place of random words."""

    _fields_ = [("words", _ADDRESS), ("pairs", _INT), ("threads", _INT)]


class GridNormals(ctypes.Structure):
    """Normal numbers on a grid in the place of random words."""

    _fields_ = [
        ("words", _ADDRESS), ("pairs", _INT), ("threads", _INT), ("scale", ctypes.c_double), ("grid", ctypes.c_double)
    ]  # fmt: skip


class MaskRows(ctypes.Structure):
    """Rows rounded to a grid, plus their masks."""

    _fields_ = [
        ("x", _ADDRESS), ("r", _ADDRESS), ("out", _ADDRESS), ("rows", _INT), ("width", _INT),
        ("x_stride", _INT), ("r_stride", _INT), ("out_stride", _INT), ("threads", _INT),
        ("grid", ctypes.c_double), ("finite", _INT),
    ]  # fmt: skip


class UnmaskRows(ctypes.Structure):
    """A product less that of its rows' masks."""

    _fields_ = [
        ("y", _ADDRESS), ("product", _ADDRESS), ("out", _ADDRESS), ("rows", _INT), ("width", _INT), ("threads", _INT)
    ]  # fmt: skip


MOST_FEW = 32
"""Rows of a request of few, with its shield rows."""


class FewRequest(ctypes.Structure):
    """A request of few rows: they are scaled, rotated and mixed; later their product is brought back."""

    _fields_ = [
        ("x", _ADDRESS), ("normal", _ADDRESS), ("mixing", _ADDRESS), ("out", _ADDRESS),
        ("turn", ctypes.POINTER(Rotation)), ("n", _INT), ("m", _INT), ("p", _INT), ("x_stride", _INT),
        ("shield_size", ctypes.c_double),
        ("y", _ADDRESS), ("answer", _ADDRESS), ("back", ctypes.POINTER(Rotation)), ("bias", _ADDRESS), ("q", _INT),
        ("finite", _INT), ("mean_square", ctypes.c_double), ("squares", ctypes.c_double),
        ("up", ctypes.c_double * MOST_FEW),
    ]  # fmt: skip


class Directions(ctypes.Structure):
    """Orthonormal columns from random words."""

    _fields_ = [("words", ctypes.c_char_p), ("c", _ADDRESS), ("k", _INT)]


class Excess(ctypes.Structure):
    """How far a product is off, over what rounding explains."""

    _fields_ = [
        ("y", _ADDRESS), ("r", _ADDRESS), ("images", _ADDRESS), ("c", _ADDRESS),
        ("rows", _INT), ("width", _INT), ("y_stride", _INT), ("k", _INT), ("threads", _INT),
        ("unit", ctypes.c_double), ("expected", ctypes.c_double), ("of_masks", ctypes.c_double),
        ("largest_square", ctypes.c_double), ("excess", ctypes.c_double), ("finite", _INT),
    ]  # fmt: skip


_FUNCTIONS = {
    "rotate": Rotation,
    "mix": Mixing,
    "multiply": Product,
    "multiply_few_rows": FewRows,
    "sketch": Sketches,
    "project": Projection,
    "make_deviates": Deviates,
    "make_grid_normals": GridNormals,
    "mask_rows": MaskRows,
    "unmask_rows": UnmaskRows,
    "send_few": FewRequest,
    "receive_few": FewRequest,
    "make_directions": Directions,
    "excess": Excess,
}
_Function = Callable[[ctypes.Structure], None]


class _Table(ctypes.Structure):
    """`Kernels` of csrc/kernels.hpp."""

    _fields_ = [
        ("isa", ctypes.c_char_p), ("itemsize", _INT), ("width", _INT), ("lanes", _INT), ("strip", _INT),
        *((name, ctypes.CFUNCTYPE(None, ctypes.POINTER(job))) for name, job in _FUNCTIONS.items()),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Kernels:
    """The kernels for one instruction set and one size of numbers. Each takes its structure, and leaves results there.

    They run on torch's own threads, without Python's lock; what they read and write must stay where it is meanwhile.
    """

    isa: str
    itemsize: int
    """Bytes of a number: 4 or 8."""
    width: int
    """Numbers in a vector register."""
    lanes: int
    """Least width of rows that are rotated, and least columns of what is mixed or multiplied."""
    strip: int
    """Least columns of the matrix that few rows are multiplied by."""
    rotate: _Function
    mix: _Function
    multiply: _Function
    multiply_few_rows: _Function
    sketch: _Function
    project: _Function
    make_deviates: _Function
    make_grid_normals: _Function
    mask_rows: _Function
    unmask_rows: _Function
    send_few: _Function
    receive_few: _Function
    make_directions: _Function
    excess: _Function


def kernels(itemsize: int) -> Kernels | None:
    """The kernels for numbers of 4 or 8 bytes in the best way that this processor has; None where torch is to compute.

    Found out once in a process.
    """
    return _best(itemsize) if are_there() else None


@functools.cache
def are_there() -> bool:
    """Whether there are kernels in this process; says so once where there are none."""
    if os.environ.get(SWITCH, "") == "0":
        return False
    try:
        return _best(4) is not None
    except (OSError, AttributeError) as reason:
        log.warning("torch computes in place of the native kernels, which takes longer: %s", reason)
        return False


@functools.cache
def kernels_of(isa: str | None, itemsize: int) -> Kernels | None:
    """The kernels for an instruction set, None for the best; None where this processor does not have it.

    Raises:
        OSError: there is no library, or not one that can be loaded here.
        AttributeError: it is not the library of this version.
    """
    library = _library()
    find = library.obfuscatune_kernels
    find.argtypes, find.restype = [ctypes.c_char_p, _INT], ctypes.POINTER(_Table)
    found = find(None if isa is None else isa.encode(), itemsize)
    if not found:
        return None
    table = found.contents
    functions = {name: getattr(table, name) for name in _FUNCTIONS}
    return Kernels(table.isa.decode(), table.itemsize, table.width, table.lanes, table.strip, **functions)


def _best(itemsize: int) -> Kernels | None:
    return kernels_of(None, itemsize)


@functools.cache
def _library() -> ctypes.CDLL:
    """Loaded once."""
    if not LIBRARY.exists():
        raise OSError("they were not built with this installation; install a C++ compiler, then the package again")
    library = ctypes.CDLL(str(LIBRARY))
    if library.obfuscatune_version() != VERSION:
        raise OSError(f"{LIBRARY.name} is of another version; install the package again")
    return library


def compute_on(threads: int) -> None:
    """Have torch and the kernels take no more than so many threads for what the calling thread computes from now on.

    Other threads keep theirs: `torch.set_num_threads` would change MKL's for all. Nothing without OpenMP.
    """
    torch.get_num_threads()  # a thread's first question sets its number, and would overwrite ours
    loaded = ctypes.CDLL(None)
    if hasattr(loaded, "omp_set_num_threads"):
        loaded.omp_set_num_threads(threads)


def bound_cores() -> set[int]:
    """All cores that torch's threads are bound to, by OMP_PROC_BIND and the like; empty where they are not bound.

    The thread that imported torch may itself use only one of them then, and whatever it starts inherits that.
    """
    loaded = ctypes.CDLL(None)  # with torch's OpenMP library
    names = ("omp_get_num_places", "omp_get_place_num_procs", "omp_get_place_proc_ids")
    if not all(hasattr(loaded, name) for name in names):  # no OpenMP, or one that binds nothing
        return set()
    places, size_of, list_of = (getattr(loaded, name) for name in names)
    cores: set[int] = set()
    for place in range(places()):
        ids = (ctypes.c_int * size_of(place))()
        list_of(place, ids)
        cores.update(ids)
    return cores
