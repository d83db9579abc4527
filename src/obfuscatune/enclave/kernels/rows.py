"""Mixing of rows in one pass: rows picked, multiplied and laid where they are to go, panel by panel of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from obfuscatune.enclave.kernels import job
from obfuscatune.enclave.kernels.compiled import Compiled
from obfuscatune.enclave.kernels.source import Job

TOGETHER = 6
"""Panels that a thread takes at a time: while it works on one, the rows of the next are fetched."""


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
        (n, q), and whether no element of y was NaN or infinite. y is read once.
    """
    result = y.new_empty(rows, y.shape[1])
    unused = y.new_empty(1, y.shape[1]).expand(y.shape[0] - rows, -1)
    targets = torch.cat([_places(result, result), _places(unused, result)])[order]
    return result, _run(y, _places(y, y), result, targets, Q_a.T, Q_b.T, code)


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
    area = job.multiples(a * b, shape.row_bytes)
    q_a, q_b = job.packed(Q_a, code), job.packed(Q_b, code)
    fields = {
        Job.PANELS: panels,
        Job.TOGETHER: max(min(panels // (2 * torch.get_num_threads()), TOGETHER), 1),
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
    scratch_bytes = (1 + a * b + max(a, b)) * shape.row_bytes
    return job.run(code.mix_rows, fields, a * b * columns, scratch_bytes) == 0
