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


class MixingOfMany:
    """A = (Q_a ⊗ Q_b) Π and its transpose as the kernel takes them, for one dtype: ready before the rows are."""

    def __init__(self, order: Tensor, rows: int, Q_a: Tensor, Q_b: Tensor, code: Compiled) -> None:
        """
        Args:
            order: int64 (m,), a permutation: which row of [x; shield] lies at each place of the grid.
            rows: n, of x.
            Q_a, Q_b: (a, a) and (b, b), a·b = m, in the dtype.
            code: the kernels for the dtype.
        """
        self._rows, self._code = rows, code
        self._order = order
        self._is_shield = (order >= rows).long()
        self._landing = order.clamp(max=rows)  # what comes back for shield rows is laid in one row behind x's
        self._factors = _Factors(Q_a, Q_b, code)
        self._transposed = _Factors(Q_a.T, Q_b.T, code)

    def mix(self, x: Tensor, shield: Tensor, out: Tensor) -> None:
        """out = A [x; shield].

        Args:
            x, shield: (n, p) and (m - n, p), rows contiguous.
            out: (m, p), contiguous.
        """
        x, shield = x.contiguous(), shield.contiguous()
        step = x.shape[1] * x.itemsize
        beyond = shield.data_ptr() - x.data_ptr() - self._rows * step
        sources = torch.add(self._order * step, self._is_shield, alpha=beyond)
        _run(x, sources, out, job.multiples(out.shape[0], step), self._factors, self._code)

    def unmix(self, y: Tensor) -> tuple[Tensor, bool]:
        """(Aᵀ y)[:n] for y (m, q), contiguous.

        Returns:
            (n, q), and whether no element of y was NaN or infinite. What is read is looked at then and there, so it
            does not matter whether y can change meanwhile.
        """
        step = y.shape[1] * y.itemsize
        result = y.new_empty(self._rows + 1, y.shape[1])
        sources = job.multiples(y.shape[0], step)
        return result[:-1], _run(y, sources, result, self._landing * step, self._transposed, self._code) == 0


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
    factors = _Factors(Q_a, Q_b, code)
    for part in (x[:, :own], last) if own < x.shape[1] else (x,):
        step = part.stride(0) * part.itemsize
        _run(part, picked * step, part, placed * step, factors, code)
    x[:, own:] = last[:, lanes - (x.shape[1] - own) :]


def multiply(left: Tensor, right: Tensor, out: Tensor, code: Compiled) -> None:
    """out (m, q) = left (m, k) right (k, q), all contiguous: for few rows, on this thread."""
    work = (ctypes.c_int64 * Product.LENGTH)(
        left.data_ptr(), right.data_ptr(), out.data_ptr(), *left.shape, right.shape[1]
    )
    team.run(code.multiply, ctypes.addressof(work), 1)


class _Factors:
    """(Q_a ⊗ Q_b) as the kernel reads it."""

    def __init__(self, Q_a: Tensor, Q_b: Tensor, code: Compiled) -> None:
        self.a, self.b = Q_a.shape[0], Q_b.shape[0]
        self._q_a, self._q_b = job.packed(Q_a, code), job.packed(Q_b, code)  # they are read by address
        self.fields = {
            Job.AREA: self.a * self.b,
            Job.A: self.a,
            Job.B: self.b,
            Job.Q_A: self._q_a.data_ptr(),
            Job.Q_B: self._q_b.data_ptr(),
        }


def _run(source: Tensor, sources: Tensor, target: Tensor, targets: Tensor, factors: _Factors, code: Compiled) -> float:
    """Row `targets[i]` of target = row i of (Q_a ⊗ Q_b) times rows `sources` of source, both tables in bytes.

    What the sum of 0 x of all that was read is: 0, or NaN where some is not finite.
    """
    shape, columns, cells = code.shape, source.shape[1], factors.a * factors.b
    panels = -(-columns // shape.lanes)
    fitting = min(TOGETHER_BYTES // (cells * shape.row_bytes), panels // (2 * torch.get_num_threads()), TOGETHER)
    together = max(fitting, 1)
    area = job.multiples(cells, together * shape.row_bytes)
    fields = {
        **factors.fields,
        Job.PANELS: panels,
        Job.TOGETHER: together,
        Job.COUNT: columns,
        Job.SOURCE: source.data_ptr(),
        Job.TARGET: target.data_ptr(),
        Job.FROM: sources.data_ptr(),
        Job.TO: targets.data_ptr(),
        Job.ROWS: area.data_ptr(),
    }
    scratch_bytes = (1 + together * cells + max(factors.a, factors.b)) * shape.row_bytes
    return job.run(code.mix_rows, fields, cells * columns, scratch_bytes)
