// What w makes of a few vectors, both ways, and its squares, in one pass: torch takes three, and its products by so
// narrow a factor leave most of a processor idle.
//
//     for each strip of columns            its part of r and of lᵀ w stays in the first cache
//         for each two rows of w           their sums with r in registers
//             for each vector of the strip   16 products with r, 16 with the rows' numbers of l
#pragma once

#include "few.hpp"
#include "simd.hpp"

namespace {

constexpr int SKETCHES = 8;              // columns of r and of l
constexpr int64_t SKETCH_ROWS = 128;     // whose products are summed one after another: errors grow with their number
constexpr int64_t SKETCH_BYTES = 1024;   // of a row of w at a time: with those of r and of lᵀ w, half of the first cache

// Where a strip is: `U` is a vector, or one number for the columns that fill none.
template <class T> struct Strip {
    const T *w, *r, *l;  // of the first row and column; r is (8, q), transposed
    T *sums, *l_w;       // (rows, 8, width), lane by lane; (8, q)
    int64_t rows, columns, q;
};

template <class T, class U, int ROWS> INLINE void sketch_rows(Strip<T> &strip, int64_t row, U &squares) {
    constexpr int W = Simd<T>::width, STEP = sizeof(U) / sizeof(T);
    const T *w = strip.w + row * strip.q, *l = strip.l + row * SKETCHES;
    T *kept = strip.sums + row * SKETCHES * W;
    U sums[ROWS][SKETCHES];
    UNROLL for (int m = 0; m < ROWS; ++m)
        UNROLL for (int v = 0; v < SKETCHES; ++v) memcpy(&sums[m][v], kept + (m * SKETCHES + v) * W, sizeof(U));
    for (int64_t k = 0; k < strip.columns; k += STEP) {
        U here[ROWS];
        UNROLL for (int m = 0; m < ROWS; ++m) {
            memcpy(&here[m], w + m * strip.q + k, sizeof(U));
            __builtin_prefetch(w + (m + ROWS) * strip.q + k);
            squares += here[m] * here[m];
        }
        UNROLL for (int v = 0; v < SKETCHES; ++v) {
            U r, total;
            memcpy(&r, strip.r + v * strip.q + k, sizeof(U));
            memcpy(&total, strip.l_w + v * strip.q + k, sizeof(U));
            UNROLL for (int m = 0; m < ROWS; ++m) {
                sums[m][v] += r * here[m];
                total += here[m] * l[m * SKETCHES + v];
            }
            memcpy(strip.l_w + v * strip.q + k, &total, sizeof(U));
        }
    }
    UNROLL for (int m = 0; m < ROWS; ++m)
        UNROLL for (int v = 0; v < SKETCHES; ++v) memcpy(kept + (m * SKETCHES + v) * W, &sums[m][v], sizeof(U));
}

template <class T, class U> double sketch_strip(Strip<T> strip) {
    U squares = {};
    int64_t row = 0;
    for (; row + 2 <= strip.rows; row += 2) sketch_rows<T, U, 2>(strip, row, squares);
    if (row < strip.rows) sketch_rows<T, U, 1>(strip, row, squares);
    T each[sizeof(U) / sizeof(T)];
    memcpy(each, &squares, sizeof squares);
    double sum = 0;
    for (T square : each) sum += (double)square;
    return sum;
}

template <class T> void sketch(Sketches *job) {
    constexpr int W = Simd<T>::width;
    const int64_t p = job->p, q = job->q, whole = q / W * W, columns = SKETCH_BYTES / (int64_t)sizeof(T);
    struct Area {
        T *r, *sums, *l_w;
    };
    const Area area = laid_out([&](Layout &layout) {
        return Area{layout.take<T>(SKETCHES * q), layout.take<T>(SKETCH_ROWS * SKETCHES * W),
                    layout.take<T>(SKETCHES * q)};
    });
    const T *w = static_cast<const T *>(job->w), *r = static_cast<const T *>(job->r);
    const T *l = static_cast<const T *>(job->l);
    T *w_r = static_cast<T *>(job->w_r), *l_w = static_cast<T *>(job->l_w);
    for (int64_t k = 0; k < q; ++k)
        for (int v = 0; v < SKETCHES; ++v) area.r[v * q + k] = r[k * SKETCHES + v];
    memset(l_w, 0, (size_t)(SKETCHES * q) * sizeof(T));
    job->squares = 0;
    for (int64_t start = 0; start < p; start += SKETCH_ROWS) {
        const int64_t rows = least(p - start, SKETCH_ROWS);
        memset(area.sums, 0, (size_t)(rows * SKETCHES * W) * sizeof(T));
        memset(area.l_w, 0, (size_t)(SKETCHES * q) * sizeof(T));
        auto strip = [&](int64_t first, int64_t stop) {
            return Strip<T>{w + start * q + first, area.r + first, l + start * SKETCHES, area.sums,
                            area.l_w + first, rows, stop - first, q};
        };
        for (int64_t first = 0; first < whole; first += columns)
            job->squares += sketch_strip<T, V<T>>(strip(first, least(first + columns, whole)));
        if (whole < q) job->squares += sketch_strip<T, T>(strip(whole, q));
        for (int64_t i = 0; i < rows * SKETCHES; ++i) {
            T sum = 0;
            for (int lane = 0; lane < W; ++lane) sum += area.sums[i * W + lane];
            w_r[start * SKETCHES + i] = sum;
        }
        for (int64_t i = 0; i < SKETCHES * q; ++i) l_w[i] += area.l_w[i];
    }
}

// What verifies a product: a few rows of x and all their sums with v in registers, in double whatever x is. They are
// summed in parts, for errors grow with the root of the number of terms: of products of doubles nothing else is left.
constexpr int64_t PART = 64;
constexpr int IMAGE_VECTORS = SKETCHES / Simd<double>::width, PROJECTED_ROWS = 8 / IMAGE_VECTORS;

template <class T, int H> void project_rows(const Projection &job, int64_t row) {
    constexpr int W = Simd<double>::width;
    V<double> totals[H][IMAGE_VECTORS] = {}, squares[H] = {};
    const T *x[H];
    UNROLL for (int m = 0; m < H; ++m) x[m] = static_cast<const T *>(job.x) + (row + m) * job.x_stride;
    for (int64_t part = 0; part < job.width; part += PART) {
        V<double> sums[H][IMAGE_VECTORS] = {};
        for (int64_t k = part; k < least(part + PART, job.width); ++k)
            UNROLL for (int v = 0; v < IMAGE_VECTORS; ++v) {
                const V<double> vector = load<double>(job.v + k * SKETCHES + v * W);
                UNROLL for (int m = 0; m < H; ++m) sums[m][v] += vector * (double)x[m][k];
            }
        UNROLL for (int m = 0; m < H; ++m)
            UNROLL for (int v = 0; v < IMAGE_VECTORS; ++v) totals[m][v] += sums[m][v];
    }
    const int64_t whole = job.width / W * W;
    UNROLL for (int m = 0; m < H; ++m) {
        double sum = 0;
        for (int64_t k = 0; k < whole; k += W) {
            const V<double> numbers = load_as<double, T>(x[m] + k);
            squares[m] += numbers * numbers;
        }
        for (int64_t k = whole; k < job.width; ++k) sum += (double)x[m][k] * (double)x[m][k];
        for (int lane = 0; lane < W; ++lane) sum += squares[m][lane];
        job.squares[row + m] = sum;
        UNROLL for (int v = 0; v < IMAGE_VECTORS; ++v)
            store<double>(job.images + (row + m) * SKETCHES + v * W, totals[m][v]);
    }
}

template <class T> void project(Projection *job) {
    Pieces pieces(job->rows, PROJECTED_ROWS);
    auto work = [&] {
        for (int64_t start, stop; pieces.take(start, stop);)
            with_height<PROJECTED_ROWS>(stop - start, [&](auto h) { project_rows<T, decltype(h)::value>(*job, start); });
    };
    on_threads(threads_for(job->threads, parts(job->rows, PROJECTED_ROWS), job->rows * job->width), work);
    if (!job->left) return;
    double left[MOST_FEW * MOST_FEW], images[MOST_FEW * SKETCHES];
    for (int64_t i = 0; i < job->rows * job->rows; ++i) left[i] = (double)static_cast<const T *>(job->left)[i];
    memcpy(images, job->images, (size_t)(job->rows * SKETCHES) * sizeof(double));
    multiply_few<double>(left, false, images, job->images, job->rows, job->rows, SKETCHES);
}

}  // namespace
