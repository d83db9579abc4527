"""Mixing of rows in one pass: rows picked, multiplied and laid where they are to go, panel by panel of columns."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from obfuscatune.enclave.kernels import job
from obfuscatune.enclave.kernels.compiled import Compiled
from obfuscatune.enclave.kernels.few import Product
from obfuscatune.enclave.kernels.source import Job
from obfuscatune.jit import team

TOGETHER_BYTES = 1 << 20
"""Of the panels that a thread works on at a time: half of what a core's second cache holds."""
TOGETHER = 8
"""These panels, at most: pieces of rows as long as that are read and written at full speed."""


def mix(x: Tensor, shield: Tensor, order: Tensor, Q_a: Tensor, Q_b: Tensor, out: Tensor, code: Compiled) -> None:
    """out = (Q_a ⊗ Q_b) [x; shield][order].

    Args:
        x, shield: (n, p) and (s, p), rows contiguous.
        order: int64 (n + s,), a permutation.
        Q_a, Q_b: (a, a) and (b, b), a·b = n + s, in x's dtype.
        out: (n + s, p), rows contiguous.
        code: the kernels for the dtype.
    """
    sources = torch.cat([_places(x, x), _places(shield, x)])[order]
    _run(x, sources, out, _places(out, out), Q_a, Q_b, code)


def unmix(y: Tensor, order: Tensor, rows: int, Q_a: Tensor, Q_b: Tensor, code: Compiled) -> tuple[Tensor, bool]:
    """What `mix` did to the first n = `rows` rows undone, by the transposes.

    Returns:
        (n, q), and whether no element of y was NaN or infinite. What is read is looked at then and there, so it does
        not matter whether y can change meanwhile.
    """
    result = y.new_empty(rows, y.shape[1])
    unused = y.new_empty(1, y.shape[1]).expand(y.shape[0] - rows, -1)
    targets = torch.cat([_places(result, result), _places(unused, result)])[order]
    return result, _run(y, _places(y, y), result, targets, Q_a.T, Q_b.T, code)


def on_rows(x: Tensor, picked: Tensor, placed: Tensor, Q_a: Tensor, Q_b: Tensor, code: Compiled) -> None:
    """x[placed] = (Q_a ⊗ Q_b) x[picked], in place, for x (n, q) whose rows are contiguous.

    Args:
        picked, placed: int64 (a·b,), numbers of rows.
        Q_a, Q_b: (a, a) and (b, b) in x's dtype; a above 1, so that all is read before anything is written.
        code: the kernels for the dtype.
    """
    lanes = code.shape.lanes
    own = x.shape[1] // lanes * lanes
    last = x[:, -lanes:].clone()  # of columns that fill no panel, one with others: done twice, it would be wrong
    for part in (x[:, :own], last) if own < x.shape[1] else (x,):
        step = part.stride(0) * part.itemsize
        _run(part, picked * step, part, placed * step, Q_a, Q_b, code)
    x[:, own:] = last[:, lanes - (x.shape[1] - own) :]


def multiply(left: Tensor, right: Tensor, out: Tensor, code: Compiled) -> None:
    """out (m, q) = left (m, k) right (k, q), all contiguous: for few rows, on this thread."""
    work = (ctypes.c_int64 * Product.LENGTH)(
        left.data_ptr(), right.data_ptr(), out.data_ptr(), *left.shape, right.shape[1]
    )
    team.run(code.multiply, ctypes.addressof(work), 1)


def _places(x: Tensor, base: Tensor) -> Tensor:
    """How many bytes each row of x lies behind `base`: int64 (n,)."""
    places = job.multiples(x.shape[0], x.stride(0) * x.itemsize)
    return places if x is base else places + (x.data_ptr() - base.data_ptr())


def _run(
    source: Tensor, sources: Tensor, target: Tensor, targets: Tensor, Q_a: Tensor, Q_b: Tensor, code: Compiled
) -> bool:
    shape, columns = code.shape, source.shape[1]
    a, b = Q_a.shape[0], Q_b.shape[0]
    panels = -(-columns // shape.lanes)
    fitting = min(TOGETHER_BYTES // (a * b * shape.row_bytes), panels // (2 * torch.get_num_threads()), TOGETHER)
    together = max(fitting, 1)
    area = job.multiples(a * b, together * shape.row_bytes)
    q_a, q_b = job.packed(Q_a, code), job.packed(Q_b, code)
    fields = {
        Job.PANELS: panels,
        Job.TOGETHER: together,
        Job.COUNT: columns,
        Job.SOURCE: source.data_ptr(),
        Job.TARGET: target.data_ptr(),
        Job.FROM: sources.data_ptr(),
        Job.TO: targets.data_ptr(),
        Job.ROWS: area.data_ptr(),
        Job.AREA: a * b,
        Job.A: a,
        Job.B: b,
        Job.Q_A: q_a.data_ptr(),
        Job.Q_B: q_b.data_ptr(),
    }
    scratch_bytes = (1 + together * a * b + max(a, b)) * shape.row_bytes
    return job.run(code.mix_rows, fields, a * b * columns, scratch_bytes) == 0
