// The worker's product for few rows: x (m, p) times w (p, q), which is read once. A BLAS copies w into another order
// first, which pays with many rows (docs/adr/0011). A w of float is widened in registers where x is double: it is read
// from memory in half the time, and no copy of it is made.
//
//     for each piece of columns, by whichever thread is free: its sums (m, columns) fit in the second cache
//         for each CHUNK rows of w                     read from memory once, from left to right
//             for each strip of columns, a few vectors wide
//                 for each block of rows of x
//                     sums in registers  +=  x's numbers, one after another, times vectors of w
//                     these are added to the sums of the chunks before
//
// The last strip of the matrix overlaps the one before; its columns are computed twice, to the same bits.
#pragma once

#include "simd.hpp"

namespace {

constexpr int STRIP_VECTORS = VECTOR_BYTES == 64 ? 4 : 2, STRIP_ROWS = 6;  // 24 or 12 sums in registers
constexpr int64_t STRIP_BYTES = STRIP_VECTORS * VECTOR_BYTES;  // of sums
constexpr int64_t CHUNK = 16;              // rows of w that are read side by side; the next strip is fetched meanwhile
constexpr int64_t AHEAD = 3;               // strips from the one that is multiplied by to the one that is fetched
constexpr int64_t PIECE_BYTES = 1 << 12;   // of a row of sums, at most

// A strip of sums (H, …) gains x (H, rows) times rows of w; meanwhile the strip at `coming` is fetched.
template <class T, class M, int H>
inline void strip(const T *x, int64_t p, const char *w, int64_t step, int64_t rows, char *sums, const char *coming) {
    constexpr int64_t BYTES = STRIP_BYTES * sizeof(M) / sizeof(T);
    V<T> totals[H][STRIP_VECTORS] = {};
    for (int64_t k = 0; k < rows; ++k, w += step, coming += step) {
        UNROLL for (int64_t line = 0; line < BYTES; line += CACHE_LINE) __builtin_prefetch(coming + line, 0, 2);
        V<T> vectors[STRIP_VECTORS];
        UNROLL for (int v = 0; v < STRIP_VECTORS; ++v) vectors[v] = load_as<T, M>(w + BYTES / STRIP_VECTORS * v);
        UNROLL for (int m = 0; m < H; ++m)
            UNROLL for (int v = 0; v < STRIP_VECTORS; ++v) totals[m][v] += vectors[v] * x[m * p + k];
    }
    UNROLL for (int m = 0; m < H; ++m)
        UNROLL for (int v = 0; v < STRIP_VECTORS; ++v) {
            char *place = sums + m * STRIP_BYTES + VECTOR_BYTES * v;
            store<T>(place, load<T>(place) + totals[m][v]);
        }
}

// T: of x, sums and out; M: of w.
template <class T, class M> void pieces_of_few_rows(const FewRows &job, Pieces &pieces, int64_t piece) {
    constexpr int64_t RATIO = sizeof(T) / sizeof(M), BYTES = STRIP_BYTES / RATIO, FETCHED = AHEAD * RATIO;
    const int64_t m = job.m, step = job.q * (int64_t)sizeof(M), last = step - BYTES;
    const int64_t out_step = job.out_stride * (int64_t)sizeof(T);
    const Blocks blocks(m, STRIP_ROWS);
    char *sums = scratch(m * piece * STRIP_BYTES);  // strip by strip, (m, …) each
    for (int64_t first, stop; pieces.take(first, stop);) {
        memset(sums, 0, (size_t)(m * (stop - first) * STRIP_BYTES));
        for (int64_t k = 0; k < job.p; k += CHUNK) {
            const int64_t rows = least(job.p - k, CHUNK);
            const T *x = static_cast<const T *>(job.x) + k;
            const char *w = static_cast<const char *>(job.w) + k * step;
            for (int64_t number = first; number < stop; ++number) {
                const char *column = w + least(number * BYTES, last), *coming;
                if (number + FETCHED < stop)
                    coming = w + least((number + FETCHED) * BYTES, last);
                else  // of the chunk that follows
                    coming = w + CHUNK * step + least(least(number + FETCHED - stop + first, stop - 1) * BYTES, last);
                char *total = sums + (number - first) * m * STRIP_BYTES;
                for (int64_t block = 0, row = 0; block < blocks.count; row += blocks.height(block++))
                    with_height<STRIP_ROWS>(blocks.height(block), [&](auto h) {
                        strip<T, M, decltype(h)::value>(x + row * job.p, job.p, column, step, rows,
                                                        total + row * STRIP_BYTES, block ? column : coming);
                    });
            }
        }
        for (int64_t number = first; number < stop; ++number)
            for (int64_t row = 0; row < m; ++row)
                memcpy(static_cast<char *>(job.out) + row * out_step + least(number * STRIP_BYTES, last * RATIO),
                       sums + ((number - first) * m + row) * STRIP_BYTES, STRIP_BYTES);
    }
}

template <class T> void multiply_few_rows(FewRows *job) {
    const int64_t strips = parts(job->q * (int64_t)sizeof(T), STRIP_BYTES), each = parts(strips, job->threads);
    const int64_t piece = parts(each, parts(each * STRIP_BYTES, PIECE_BYTES));  // as many for one thread as for others
    Pieces pieces(strips, piece);
    auto work = [&] {
        if (sizeof(T) == 8 && job->w_itemsize == 4)
            pieces_of_few_rows<T, float>(*job, pieces, piece);
        else
            pieces_of_few_rows<T, T>(*job, pieces, piece);
    };
    on_threads(least(job->threads, strips), work);
}

}  // namespace
