"""Random orthogonal matrices, and the grids on which small ones stand in for a large one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from obfuscatune.enclave.keys import SecretStream  # which draws by the kernels, and these multiply as here


def haar(stream: SecretStream, size: int) -> Tensor:
    """A Haar-distributed orthogonal matrix, float64 (size, size).

    The QR of normal numbers, with the signs of R's diagonal moved into Q (Mezzadri 2007, arXiv math-ph/0609050):
    without that step QR's own sign convention shows in the distribution. LAPACK's two steps by themselves:
    `torch.linalg.qr` wakes threads for small matrices, which takes longer than the QR.
    """
    factored, tau = torch.geqrf(stream.normal(size, size))
    Q: Tensor = torch.linalg.householder_product(factored, tau)
    signs = torch.copysign(torch.ones_like(tau), factored.diagonal())
    return Q.mul_(signs).contiguous()  # LAPACK's matrices lie column by column


def kronecker_rows(Q_a: Tensor, Q_b: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """(Q_a ⊗ Q_b) x for x (a*b, p), without building the product: two small multiplications.

    `out` (a*b, p), contiguous, takes the result where it is given.
    """
    a, b = Q_a.shape[0], Q_b.shape[0]
    if out is None:
        out = torch.empty_like(x)
    if a == 1:
        return torch.mm(Q_b, x, out=out)
    outer = torch.mm(Q_a, x.view(a, -1))  # across groups: one (a, a) @ (a, b*p)
    torch.matmul(Q_b, outer.view(a, b, -1), out=out.view(a, b, -1))  # within each group of b rows
    return out


def kronecker_columns(x: Tensor, Q_a: Tensor, Q_b: Tensor) -> Tensor:
    """x (Q_a ⊗ Q_b) for x (n, a*b), without building the product."""
    a, b = Q_a.shape[0], Q_b.shape[0]
    inner = torch.mm(x.reshape(-1, b), Q_b)  # within each group of b columns
    if a == 1:
        return inner
    return torch.matmul(Q_a.T, inner.view(-1, a, b)).view(-1, a * b)  # across the groups


def permute_columns(x: Tensor, permutation: Tensor) -> Tensor:
    """x Π for x (n, p): column j of the result is column `permutation[j]` of x.

    A permutation of p / 2 moves pairs of columns, each as one number of twice the size: half the work. `gather`,
    because `index_select` along the last dimension runs on one thread.
    """
    if 2 * permutation.numel() == x.shape[1]:
        numbers = x.contiguous().view(-1)  # flat, since a single row may have any stride and still be contiguous
        if numbers.storage_offset() % 2:
            numbers = numbers.clone()
        pairs = numbers.view(_OF_TWICE_THE_SIZE[x.dtype]).view(x.shape[0], permutation.numel())
        return permute_columns(pairs, permutation).view(x.dtype)
    return torch.gather(x, 1, permutation.expand(x.shape))


_OF_TWICE_THE_SIZE = {
    torch.bfloat16: torch.int32,
    torch.float16: torch.int32,
    torch.float32: torch.float64,
    torch.float64: torch.complex128,
}


def covering_grid(size: int) -> tuple[int, int]:
    """The smallest grid a <= b <= 2a with at least ``size`` >= 2 cells: 520 = 20*26, 4104 = 54*76."""
    cells = size
    while True:
        for a in range(math.isqrt(cells), math.isqrt(max(cells // 2 - 1, 0)), -1):
            if cells % a == 0:
                return a, cells // a
        cells += 1


def inner_grid(size: int) -> tuple[int, int]:
    """The near-square grid a <= b <= 4a that fills `size` best from within: a*b <= size.

    Exact where `size` has such a factorisation (768 = 24*32, 3072 = 48*64, 1600 = 40*40); for
    the rest, primes too, it leaves less than the smaller side over.
    """
    side = math.isqrt(size)
    candidates = range(max(side // 2, 1), side + 1)
    a = max(candidates, key=lambda a: (a * (size // a), a))
    return a, size // a
