// Few rows, on the calling thread: products of small matrices, and a rotation row by row.
//
//     x  ->  picked by Π₁  ->  (Q_a ⊗ Q_b) on the first grid  ( ->  picked by Π₂  ->  on the second )  ->  picked  ->  y
#pragma once

#include "simd.hpp"

namespace {

// out (rows, columns) = left (rows, inner) right (inner, columns); `turned`: left lies transposed. Four rows by two
// vectors at a time, so that no sum waits for itself; the last ones overlap those before, and compute the same again.
template <class T>
void multiply_few(const T *left, bool turned, const T *right, T *out, int64_t rows, int64_t inner, int64_t columns) {
    constexpr int H = 4, W = Simd<T>::width;
    const int64_t row_step = turned ? 1 : inner, step = turned ? rows : 1;
    for (int64_t row = 0; row < rows; row += H) {
        int64_t numbers[H];
        UNROLL for (int m = 0; m < H; ++m) numbers[m] = least(row + m, rows - 1);
        for (int64_t column = 0; column < columns; column += VECTORS * W) {
            int64_t places[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; ++v) places[v] = least(column + v * W, columns - W);
            V<T> sums[H][VECTORS] = {};
            for (int64_t k = 0; k < inner; ++k) {
                V<T> vectors[VECTORS];
                UNROLL for (int v = 0; v < VECTORS; ++v) vectors[v] = load<T>(right + k * columns + places[v]);
                UNROLL for (int m = 0; m < H; ++m) {
                    const T factor = left[numbers[m] * row_step + k * step];
                    UNROLL for (int v = 0; v < VECTORS; ++v) sums[m][v] += vectors[v] * factor;
                }
            }
            UNROLL for (int m = 0; m < H; ++m)
                UNROLL for (int v = 0; v < VECTORS; ++v)
                    store<T>(out + numbers[m] * columns + places[v], sums[m][v]);
        }
    }
}

template <class T> void multiply(Product *job) {
    multiply_few<T>(static_cast<const T *>(job->left), false, static_cast<const T *>(job->right),
                    static_cast<T *>(job->out), job->rows, job->inner, job->columns);
}

template <class T> void rotate_few(Rotation &job) {
    constexpr int W = Simd<T>::width;
    const int64_t width = job.width;
    struct Rows {
        T *row, *other, *spare;
    };
    const Rows rows = laid_out([&](Layout &layout) {
        return Rows{layout.take<T>(width), layout.take<T>(width), layout.take<T>(width)};
    });
    const T *bias = static_cast<const T *>(job.bias);
    auto on_grid = [&](const Grid &grid, T *row) {
        T *u = row + grid.start;
        if (grid.a > 1)
            multiply_few<T>(static_cast<const T *>(grid.q_a), true, u, rows.spare, grid.a, grid.a, grid.b);
        else
            memcpy(rows.spare, u, (size_t)grid.b * sizeof(T));
        multiply_few<T>(rows.spare, false, static_cast<const T *>(grid.q_b), u, grid.a, grid.b, grid.b);
    };
    V<T> seen = {};
    for (int64_t number = 0; number < job.rows; ++number) {
        const T *x = static_cast<const T *>(job.x) + number * job.x_stride;
        T *y = static_cast<T *>(job.y) + number * width, *found = rows.row;
        for (int64_t j = 0; j < width; j += W) look_at<T>(load<T>(x + least(j, width - W)), seen);
        for (int64_t j = 0; j < width; ++j) rows.row[j] = x[job.first[j]];
        on_grid(job.grids[0], rows.row);
        if (job.between) {
            for (int64_t j = 0; j < width; ++j) rows.other[j] = rows.row[job.between[j]];
            on_grid(job.grids[1], rows.other);
            found = rows.other;
        }
        for (int64_t j = 0; j < width; ++j) y[j] = found[job.last[j]] + (bias ? bias[j] : (T)0);
    }
    if (!is_clean<T>(seen)) forget_finite(job.finite);
}

}  // namespace
