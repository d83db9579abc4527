"""The programs of `gpu`, as Triton compiles them: each works on tiles that lie in registers, padded to powers of two.

Run on tensors of the CPU by Triton's interpreter, where TRITON_INTERPRET=1 is in the environment.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
# Triton reads annotations itself, and takes none but constexpr: all others are numbers, tiles or addresses.

import triton
import triton.language as tl


@triton.jit
def square(Q, size, SIZE: tl.constexpr):
    """Q (size, size), padded by zeros."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    return tl.load(Q + i * size + j, mask=(i < size) & (j < size), other=0.0)


@triton.jit
def rotate_rows(
    x, y, picked, placed, Q_a, Q_b, bias,
    n, p, stride, a, b,
    A: tl.constexpr, B: tl.constexpr, R: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """R rows of x, each as a matrix (a, b): y = Q_aᵀ x Q_b, gathered before and scattered afterwards."""
    r = tl.arange(0, R)[:, None, None]
    i = tl.arange(0, A)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    row = tl.program_id(0).to(tl.int64) * R + r
    is_cell = (i < a) & (j < b)
    is_there = is_cell & (row < n)
    source = tl.load(picked + i * b + j, mask=is_cell, other=0)
    cells = tl.load(x + row * stride + source, mask=is_there, other=0.0)  # (R, A, B)
    within = tl.dot(tl.reshape(cells, (R * A, B)), square(Q_b, b, B), input_precision="ieee", out_dtype=cells.dtype)
    across = tl.reshape(tl.permute(tl.reshape(within, (R, A, B)), (1, 0, 2)), (A, R * B))
    turned = tl.dot(tl.trans(square(Q_a, a, A)), across, input_precision="ieee", out_dtype=cells.dtype)
    turned = tl.permute(tl.reshape(turned, (A, R, B)), (1, 0, 2))  # (R, A, B)
    target = tl.load(placed + i * b + j, mask=is_cell, other=0)
    if HAS_BIAS:
        turned += tl.load(bias + target, mask=is_cell, other=0.0)
    tl.store(y + row * p + target, turned, mask=is_there)


@triton.jit
def kronecker(cells, Q_a, Q_b, a, b, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """(Q_a ⊗ Q_b) of cells (A, B, C); as (B, A, C)."""
    across = tl.dot(square(Q_a, a, A), tl.reshape(cells, (A, B * C)), input_precision="ieee", out_dtype=cells.dtype)
    across = tl.reshape(tl.permute(tl.reshape(across, (A, B, C)), (1, 0, 2)), (B, A * C))
    within = tl.dot(square(Q_b, b, B), across, input_precision="ieee", out_dtype=cells.dtype)
    return tl.reshape(within, (B, A, C))


@triton.jit
def mix_columns(
    x, shield, order, Q_a, Q_b, out,
    n, p, stride, out_stride, a, b,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """C columns of out = (Q_a ⊗ Q_b) P [x; shield]."""
    i = tl.arange(0, A)[:, None, None]
    j = tl.arange(0, B)[None, :, None]
    column = tl.program_id(0) * C + tl.arange(0, C)[None, None, :]
    is_row = (i < a) & (j < b)
    source = tl.load(order + i * b + j, mask=is_row, other=0).to(tl.int64)
    is_there = is_row & (column < p)
    of_x = tl.load(x + source * stride + column, mask=is_there & (source < n), other=0.0)
    of_shield = tl.load(shield + (source - n) * p + column, mask=is_there & (source >= n), other=0.0)
    mixed = kronecker(of_x + of_shield, Q_a, Q_b, a, b, A, B, C)
    place = (tl.arange(0, A)[None, :, None] * b + tl.arange(0, B)[:, None, None]).to(tl.int64)
    is_placed = (tl.arange(0, A)[None, :, None] < a) & (tl.arange(0, B)[:, None, None] < b) & (column < p)
    tl.store(out + place * out_stride + column, mixed, mask=is_placed)


@triton.jit
def unmix_columns(
    y, order, Q_a, Q_b, x,
    n, p, stride, a, b,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """C columns of x = (Pᵀ (Q_a ⊗ Q_b) y)[:n]; the transposed Q are given."""
    i = tl.arange(0, A)[:, None, None]
    j = tl.arange(0, B)[None, :, None]
    column = tl.program_id(0) * C + tl.arange(0, C)[None, None, :]
    is_there = (i < a) & (j < b) & (column < p)
    cells = tl.load(y + (i * b + j).to(tl.int64) * stride + column, mask=is_there, other=0.0)
    unmixed = kronecker(cells, Q_a, Q_b, a, b, A, B, C)
    i_placed, j_placed = tl.arange(0, A)[None, :, None], tl.arange(0, B)[:, None, None]
    is_placed = (i_placed < a) & (j_placed < b)
    target = tl.load(order + i_placed * b + j_placed, mask=is_placed, other=n).to(tl.int64)
    tl.store(x + target * p + column, unmixed, mask=is_placed & (target < n) & (column < p))
