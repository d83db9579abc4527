// The C interface of the library: what Python fills in, and one table of functions for each instruction set.
// src/obfuscatune/native.py mirrors it; raise VERSION in both when a field changes.
//
// Matrices are row-major and contiguous where no stride is given. Numbers are float or double, as the table says.
#pragma once

#include <stdint.h>

enum { VERSION = 4, MOST_FEW = 32 };  // rows of a request of few, with its shield rows

struct Grid {  // columns `start` to `start + a·b` of a row, as an (a, b) matrix U, become Q_aᵀ U Q_b
    int64_t start, a, b;
    const void *q_a, *q_b;  // (a, a), (b, b)
};

struct Rotation {  // y = x Π₁ (Q_a ⊗ Q_b) Π₂ [(Q_c ⊗ Q_d) Π₃] + bias, for x (rows, width)
    const void *x;
    void *y;  // may be x
    const void *bias;  // (width,), or null
    int64_t rows, width, x_stride;
    const int64_t *first, *first_inverse;  // column j after Π₁ is column first[j] before
    const int64_t *between;                // Π₂ where there are two grids, else null
    const int64_t *last;
    Grid grids[2];
    int64_t threads;
    int64_t finite;  // result: whether x held neither NaN nor infinity
};

struct Mixing {  // rows at `targets` = (Q_a ⊗ Q_b) times rows at `sources`; transposed: (Q_aᵀ ⊗ Q_bᵀ)
    const int64_t *sources, *targets;  // a·b addresses each; rows overlap only where both tables name the same set
    int64_t columns, a, b;
    const void *q_a, *q_b;
    int64_t transposed, threads;
    int64_t finite;  // result: whether all that was read held neither NaN nor infinity
};

struct Product {  // out (rows, columns) = left (rows, inner) right (inner, columns), for few rows, on the calling thread
    const void *left, *right;
    void *out;
    int64_t rows, inner, columns;  // columns: at least a vector
};

struct FewRows {  // out (m, q) = x (m, p) w (p, q), for few rows and a large w, which is read once
    const void *x, *w;
    void *out;
    int64_t m, p, q, out_stride, threads;
    int64_t w_itemsize;  // 4 where w is float and x and out are double, else the size of all numbers
};

struct Sketches {  // w_r = w r and l_w = lᵀ w for w (p, q), r (q, 8), l (p, 8); on the calling thread
    const void *w, *r, *l;
    void *w_r, *l_w;  // (p, 8), (8, q)
    int64_t p, q;
    double squares;  // result: the sum of squares of w
};

struct Projection {  // images (rows, 8) = x v for x (rows, width), float or double, and v (width, 8); and each row's squares
    const void *x;
    const double *v;
    double *images, *squares;
    int64_t rows, width, x_stride, threads;
    const void *left;  // where not null, (rows, rows), of x's numbers, rows <= MOST_FEW: images = left x v
};

struct FewRequest {  // out (m, p) = A [D x R; N] for x (n, p), n <= m <= MOST_FEW; then answer (n, q) = D⁻¹ (Aᵀ y)[:n] R'⁻¹ + bias
    const void *x, *normal;  // normal: m·m numbers for A, then (m - n)·p for N
    void *mixing;            // room for A and Aᵀ (m, m), and for [D x R; N] (m, p), which stay for `receive` and others
    void *out;
    const Rotation *turn;  // R, or null for none
    int64_t n, m, p, x_stride;
    double shield_size;  // N = normal · shield_size
    const void *y;       // (m, q)
    void *answer;
    const Rotation *back;  // R'⁻¹, or null for none
    const void *bias;      // (q,), or null
    int64_t q;
    int64_t finite;      // result: whether x, or what was read of y, held neither NaN nor infinity; else x is not sent
    double mean_square;  // result of `send`: of all elements of D x
    double squares;      // result of `receive`: the sum of squares of D (answer - bias)
    double up[MOST_FEW];  // result of `send`: D⁻¹, powers of two, but 0 for a row of zeros
};

struct Directions {  // c (8, k), orthonormal columns, from 64·k random bytes; k even
    const char *words;
    double *c;
    int64_t k;
};

struct Excess {  // of y (rows, width), float or double: the largest |(y r - images) c| of any row over its tau =
    const void *y;  // unit·(|row| + expected + root mean square of all |row|) + of_masks, with |row|² <= largest_square
    const double *r, *images, *c;  // (width, 8), (rows, 8), (8, k)
    int64_t rows, width, y_stride, k, threads;
    double unit, expected, of_masks, largest_square;
    double excess;   // result: infinite where anything is not finite
    int64_t finite;  // result: 0 where a row holds NaN or infinity, or squares that overflow
};

struct Deviates {  // 2·pairs random words of 32 bits become as many normal deviates, float, in their place
    void *words;
    int64_t pairs, threads;  // pairs: a multiple of 16
};

struct GridNormals {  // 2·pairs random words of 64 bits become as many doubles grid·⌊scale·z⌋, z normal, in their place
    void *words;
    int64_t pairs, threads;  // pairs: a multiple of 16
    double scale, grid;
};

struct MaskRows {  // out = grid·rint(x / grid) + r for x (rows, width), float or double; r and out are double
    const void *x;
    const double *r;
    double *out;  // may be r
    int64_t rows, width, x_stride, r_stride, out_stride, threads;
    double grid;     // a power of two
    int64_t finite;  // result: whether x held neither NaN nor infinity
};

struct UnmaskRows {  // out = y - product, rounded, for y and product (rows, width), double; then product = 0
    const double *y;
    double *product;
    void *out;  // float or double
    int64_t rows, width, threads;
};

struct Kernels {
    const char *isa;
    int64_t itemsize;  // 4: float, 8: double
    int64_t width;     // numbers in a vector
    int64_t lanes;     // least width of a rotation, least columns of a mixing
    int64_t strip;     // least columns of few rows
    void (*rotate)(Rotation *);
    void (*mix)(Mixing *);
    void (*multiply)(Product *);
    void (*multiply_few_rows)(FewRows *);
    void (*sketch)(Sketches *);
    void (*project)(Projection *);
    void (*make_deviates)(Deviates *);
    void (*make_grid_normals)(GridNormals *);
    void (*mask_rows)(MaskRows *);
    void (*unmask_rows)(UnmaskRows *);
    void (*send_few)(FewRequest *);
    void (*receive_few)(FewRequest *);
    void (*make_directions)(Directions *);
    void (*excess)(Excess *);
};
